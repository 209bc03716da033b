"""Continuous batching over one target group, as pure policy: events in, actions out.

Sans-IO: time comes with every event, and there are no sockets, clocks, tasks or Ray here. The same code runs in the
router, under property tests and in simulations. After any event, `poll` says what to do now and `next_deadline` when
to ask again if nothing else happens.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from itertools import islice, takewhile

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.errors import InvalidRequestError, OverloadedError, RequestError, UnavailableError
from dflash_ray.core.ngram import IndexingRoom
from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import Action, CloseSequences, Emit, Fail, RunStep
from dflash_ray.router.draft_rates import DraftRates
from dflash_ray.router.drafting import Drafting
from dflash_ray.router.sequence import Phase, RouterSequence

_MAX_PENDING_ROWS = 256
_INDEXED_AT_ONCE = 2048  # tokens of long texts that one poll indexes for n-grams: some two milliseconds


@dataclass(frozen=True, slots=True)
class TargetLimits:
    """What the target group said in its hello, and the lease's epoch."""

    epoch: int
    max_model_len: int
    vocab_size: int
    page_size: int
    num_pages: int
    max_batch_tokens: int
    colocated_draft_tokens: int = 0


class Scheduler:
    """Requests of one target group, from arrival to their last token."""

    def __init__(self, config: DflashRayConfig) -> None:
        self._router = config.router
        self._uses_ngram = config.drafter.method != "none"
        self._weighs_ngrams = config.router.prefer_ngram and config.uses_features
        self._rates = DraftRates()
        self._indexing_room = IndexingRoom(_INDEXED_AT_ONCE)
        self._is_colocated = config.drafter.placement_mode == "colocated"
        self._wants_features = config.uses_features
        self.drafting = Drafting(config.router.draft_timeout_ms / 1000, config.router.num_candidates)
        self.limits: TargetLimits | None = None
        self.free_pages = 0
        self._sequences: dict[int, RouterSequence] = {}
        self._waiting: deque[RouterSequence] = deque()
        self._running: list[RouterSequence] = []
        self._close_next: list[int] = []
        self._actions: list[Action] = []
        self._next_id = 1
        self._step_id = 0
        self._step: dict[int, RouterSequence] | None = None  # entries of the step in flight
        self._lost_at: float | None = 0.0
        self._next_cohort = 0
        self.num_preemptions = 0
        self.num_drafts_by_source: Counter[str] = Counter()
        self.num_draft_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def arrive(self, request: router_pb2.GenerateTokensRequest, now: float) -> RouterSequence:
        """Takes a request. Raises OverloadedError when the queue is full, InvalidRequestError when it can never run."""
        if len(self._waiting) >= self._router.max_waiting + max(0, self._router.max_running - len(self._running)):
            raise OverloadedError(f"{len(self._waiting)} requests are waiting; try again later")
        if self.limits is not None:
            self._check_fits(request, self.limits)
        draft_tokens = self._draft_tokens(request.speculation)
        sequence = RouterSequence(
            self._next_id, request, list(request.token_ids), draft_tokens, now, stats=AcceptanceStats(draft_tokens)
        )
        self._next_id += 1
        self._sequences[sequence.sequence_id] = sequence
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: RouterSequence) -> None:
        """The client is gone: the sequence is freed with the next message to the target."""
        if self._sequences.get(sequence.sequence_id) is sequence:
            self._remove(sequence)

    def _draft_tokens(self, speculation: router_pb2.Speculation) -> int:
        policy = speculation.policy
        is_default = policy == router_pb2.SPECULATION_POLICY_UNSPECIFIED
        if policy == router_pb2.SPECULATION_POLICY_OFF or (is_default and self._router.policy == "off"):
            return 0
        return speculation.draft_tokens if speculation.HasField("draft_tokens") else self._router.draft_tokens

    def _check_fits(self, request: router_pb2.GenerateTokensRequest, limits: TargetLimits) -> None:
        length = len(request.token_ids)
        if length >= limits.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {length} tokens, but prompt and answer must fit the context of "
                f"{limits.max_model_len}; shorten the prompt",
                "prompt",
            )
        if self._pages(length + 1) > limits.num_pages:
            raise InvalidRequestError(
                f"the prompt has {length} tokens, more than the KV cache holds; shorten the prompt", "prompt"
            )
        if any(token >= limits.vocab_size for token in request.token_ids):
            raise InvalidRequestError(f"token ids must be below {limits.vocab_size}", "prompt")

    def target_ready(self, limits: TargetLimits, now: float) -> None:
        """A target group said hello; it has no sequences yet."""
        self.limits = limits
        self.free_pages = limits.num_pages
        self._lost_at = None
        for sequence in list(self._waiting):
            try:
                self._check_fits(sequence.request, limits)
            except RequestError as error:
                self._fail(sequence, error)

    def target_lost(self, now: float) -> None:
        """The stream broke: what ran waits, with its tokens, for the group to come back."""
        self.limits = None
        self._step = None
        self._lost_at = now
        self._close_next.clear()
        for sequence in reversed(self._running):
            sequence.leave_target()
            self._waiting.appendleft(sequence)
        self._running.clear()

    def step_done(self, result: target_pb2.StepResult, now: float) -> None:
        """Takes the tokens of a step."""
        entries = self._step or {}
        self._step = None
        self.free_pages = result.free_pages
        features = {part.sequence_id: part for part in result.features}
        logprobs = iter(result.logprobs)
        errors = iter(result.errors)
        offset = 0
        for i, sequence_id in enumerate(result.sequence_ids):
            count = result.num_tokens[i]
            tokens = list(result.token_ids[offset : offset + count])
            offset += count
            sequence = entries[sequence_id]
            asked = sequence.request.sampling.HasField("num_logprobs")
            token_logprobs = next(logprobs) if asked and count else None
            error = next(errors) if result.statuses[i] == target_pb2.ENTRY_STATUS_FAILED else ""
            if sequence_id not in self._sequences or not sequence.in_step:
                continue  # cancelled or preempted while the step ran
            sequence.in_step = False
            if result.statuses[i] != target_pb2.ENTRY_STATUS_OK:
                self._entry_failed(sequence, result.statuses[i], error, now)
                continue
            if sequence_id in features:
                sequence.pending.append(features[sequence_id])
            self._advance(sequence, tokens, result.num_accepted_drafts[i], now)
            self._emit(sequence, tokens, token_logprobs, result.finish_reasons[i])
        for block in result.colocated_drafts:
            drafted = self._sequences.get(block.sequence_id)
            if drafted is not None and drafted.committed_len == block.committed_len:
                drafted.take_draft(block, "colocated")

    def _advance(self, sequence: RouterSequence, tokens: list[int], num_accepted: int, now: float) -> None:
        if sequence.phase is Phase.DECODE:
            sequence.stats.record(len(sequence.draft or ()), num_accepted)
            if tokens:
                self._judge_drafts(sequence, tokens[0])
        elif tokens:
            sequence.phase = Phase.DECODE
            sequence.decoding_since = sequence.decoding_since or now
        sequence.append(tokens)

    def _judge_drafts(self, sequence: RouterSequence, token: int) -> None:
        """Takes note of whose first draft was the token that came."""
        ngram = sequence.ngram_draft
        if ngram is not None and ngram.tokens:
            self._rates.saw_ngram(ngram.match_len, ngram.tokens[0] == token)
        if sequence.draft and sequence.draft_source in ("remote", "colocated"):
            self._rates.saw_drafter(sequence.draft[0] == token)

    def _emit(
        self,
        sequence: RouterSequence,
        tokens: list[int],
        logprobs: common_pb2.TokenLogprobs | None,
        finish_reason: common_pb2.FinishReason,
    ) -> None:
        if tokens:
            self._actions.append(Emit(sequence, tokens, logprobs, finish_reason))
        if finish_reason:
            self._remove(sequence)

    def _entry_failed(self, sequence: RouterSequence, status: int, error: str, now: float) -> None:
        """One entry did not run; its neighbours are not concerned."""
        if status == target_pb2.ENTRY_STATUS_FAILED:
            self._fail(sequence, RequestError(error))
        elif status == target_pb2.ENTRY_STATUS_NO_PAGES:
            self._preempt_for(sequence)
        else:  # the target has another past or none: start again with the tokens known here
            self._requeue(sequence)

    def _preempt_for(self, sequence: RouterSequence) -> None:
        """Frees pages by putting the youngest sequence back; a lone sequence has filled the whole cache."""
        youngest = max(self._running, key=lambda other: other.sequence_id)
        if len(self._running) == 1:
            self._actions.append(Emit(sequence, [], None, common_pb2.FINISH_REASON_LENGTH))
            self._remove(sequence)
            return
        youngest.num_preemptions += 1
        self.num_preemptions += 1
        self._requeue(youngest)

    def _requeue(self, sequence: RouterSequence) -> None:
        self._running.remove(sequence)
        self._close_next.append(sequence.sequence_id)
        sequence.leave_target()
        self._waiting.appendleft(sequence)

    def _fail(self, sequence: RouterSequence, error: RequestError) -> None:
        self._actions.append(Fail(sequence, error))
        self._remove(sequence)

    def _remove(self, sequence: RouterSequence) -> None:
        del self._sequences[sequence.sequence_id]
        self.drafting.close(sequence)
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._close_next.append(sequence.sequence_id)

    def drafter_lost(self, drafter_id: str) -> None:
        self.drafting.lose(drafter_id, self._running)

    def drafts_done(self, drafter_id: str, reply: drafter_pb2.DraftReply) -> None:
        if self.limits is not None:
            self.drafting.answer(drafter_id, reply, self._sequences, self.limits.epoch)

    def replayed(self, features: common_pb2.ContextFeatures) -> None:
        sequence = self._sequences.get(features.sequence_id)
        if sequence is not None:
            self.drafting.replayed(sequence, features)

    def poll(self, now: float) -> list[Action]:
        """Everything there is to do at `now`, in order."""
        self._give_up_waiting(now)
        self._indexing_room.left = _INDEXED_AT_ONCE
        if self.limits is not None:
            self.drafting.expire(self._running, now)
            self._admit(now)
            idle = [s for s in self._running if s.phase is Phase.DECODE and not s.in_step]
            if self._weighs_ngrams:
                self._prefer_ngrams(idle)
            if not self._is_colocated:
                self._actions += self.drafting.request(idle, self.limits.max_model_len, self.limits.epoch, now)
            if self._step is None:
                self._start_step(now)
            if self._close_next:  # no step takes them along
                self._actions.append(CloseSequences(self._close_next))
                self._close_next = []
        actions, self._actions = self._actions, []
        return actions

    def _prefer_ngrams(self, idle: list[RouterSequence]) -> None:
        """Gives sequences whose tokens have just come an n-gram in a drafter's place, where that promises more."""
        assert self.limits is not None
        for sequence in idle:
            count = sequence.num_drafts(self.limits.max_model_len)
            if sequence.ngram_draft is not None or not count:
                continue
            match_len = sequence.look_up(count, self._indexing_room).match_len
            # Features that wait for the drafter's next request are not piled up without end.
            if self._rates.prefers_ngram(match_len) and sequence.num_pending_rows < _MAX_PENDING_ROWS:
                sequence.take_ngram(count, self._indexing_room)

    def next_deadline(self) -> float | None:
        """When `poll` has something to do even if no event comes."""
        deadlines = [s.draft_deadline for s in self._running if s.draft_deadline is not None]
        if self._lost_at is not None and self._waiting:
            deadlines.append(self._lost_at + self._router.target_wait_s)
        return min(deadlines, default=None)

    def _give_up_waiting(self, now: float) -> None:
        if self._lost_at is not None and now >= self._lost_at + self._router.target_wait_s:
            for sequence in list(self._waiting):
                self._fail(sequence, UnavailableError("no target group is up; try again later"))

    def _pages(self, tokens: int) -> int:
        assert self.limits is not None
        return -(-tokens // self.limits.page_size)

    def _admit(self, now: float) -> None:
        """Moves waiting sequences to the target while their tokens and a block for each running one fit."""
        while self._waiting and len(self._running) < self._router.max_running:
            sequence = self._waiting[0]
            promised = sum(self._pages(s.committed_len + 1) for s in self._running if s.phase is Phase.PREFILL)
            margin = sum(1 for s in self._running if s.phase is Phase.DECODE)
            needed = self._pages(sequence.committed_len + 1 + sequence.draft_tokens)
            if self._running and needed + promised + margin > self.free_pages:
                return
            self._waiting.popleft()
            sequence.phase = Phase.PREFILL
            sequence.admitted_at = sequence.admitted_at or now
            sequence.cohort = self._smaller_cohort()
            self._running.append(sequence)

    def _smaller_cohort(self) -> int:
        if self._router.cohorts == 1:
            return 0
        sizes = [sum(1 for s in self._running if s.cohort == cohort) for cohort in (0, 1)]
        return sizes.index(min(sizes))

    def _start_step(self, now: float) -> None:
        """Sends the next step when a cohort has all its drafts or has waited long enough for them."""
        decoding: list[RouterSequence] = []
        is_waiting = False
        for cohort in (self._next_cohort, 1 - self._next_cohort):
            members = [s for s in self._running if s.phase is Phase.DECODE and s.cohort == cohort]
            if members and all(s.draft_deadline is None for s in members):
                decoding = members
                self._next_cohort = (1 - cohort) if self._router.cohorts == 2 else 0
                break
            is_waiting |= bool(members)
        prefilling = [s for s in self._running if s.phase is Phase.PREFILL]
        if (decoding or prefilling) and not (is_waiting and not decoding):
            self._actions.append(RunStep(self._build_step(decoding, prefilling)))

    def _build_step(self, decoding: list[RouterSequence], prefilling: list[RouterSequence]) -> target_pb2.Step:
        assert self.limits is not None
        self._step_id += 1
        step = target_pb2.Step(
            step_id=self._step_id,
            epoch=self.limits.epoch,
            close=self._close_next,
            num_candidates=self._router.num_candidates,
        )
        self._close_next = []
        self._step = {}
        rows = self.limits.max_batch_tokens
        for sequence in decoding:
            rows -= self._add_verify(step, sequence, rows)
        for sequence in prefilling:
            rows -= self._add_prefill(step, sequence, rows)
        return step

    def _add_verify(self, step: target_pb2.Step, sequence: RouterSequence, room: int) -> int:
        """Adds a chain of drafts; returns its rows."""
        assert self.limits is not None and self._step is not None
        if room < 1:
            return 0
        vocab_size = self.limits.vocab_size
        count = min(sequence.num_drafts(self.limits.max_model_len), room - 1)
        if sequence.draft is None and count and self._uses_ngram:
            sequence.take_ngram(count, self._indexing_room)
        in_vocabulary = takewhile(lambda token: token < vocab_size, sequence.draft or [])
        sequence.draft = list(islice(in_vocabulary, count))
        step.verify_ids.append(sequence.sequence_id)
        step.base_lens.append(sequence.committed_len)
        step.num_drafts.append(len(sequence.draft))
        step.draft_token_ids.extend(sequence.draft)
        step.draft_parents.extend(range(len(sequence.draft)))
        num_candidates = sequence.drawn.num_candidates if sequence.drawn is not None else 0
        step.num_draft_candidates.append(num_candidates)
        if sequence.drawn is not None:
            step.draft_candidate_ids.extend(sequence.drawn.candidate_ids[: num_candidates * len(sequence.draft)])
            step.draft_log_probs.extend(sequence.drawn.log_probs[: num_candidates * len(sequence.draft)])
        self.num_drafts_by_source[sequence.draft_source] += 1
        self.num_draft_tokens += len(sequence.draft)
        self._join_step(step, sequence)
        return 1 + len(sequence.draft)

    def _add_prefill(self, step: target_pb2.Step, sequence: RouterSequence, room: int) -> int:
        """Adds the next chunk of a prompt; returns its rows."""
        assert self._step is not None
        chunk = min(sequence.committed_len - sequence.num_prefilled, self._router.prefill_chunk_tokens, room)
        if chunk <= 0:
            return 0
        if sequence.num_prefilled == 0:
            step.open.append(sequence.open_message(self._wants_features and sequence.draft_tokens > 0))
        step.prefill_ids.append(sequence.sequence_id)
        step.prefill_lens.append(chunk)
        sequence.num_prefilled += chunk
        self._join_step(step, sequence)
        return chunk

    def _join_step(self, step: target_pb2.Step, sequence: RouterSequence) -> None:
        assert self._step is not None and self.limits is not None
        sequence.in_step = True
        self._step[sequence.sequence_id] = sequence
        if self.limits.colocated_draft_tokens and sequence.draft_tokens:
            step.colocated_draft_ids.append(sequence.sequence_id)
            step.colocated_num_drafts.append(min(sequence.draft_tokens, self.limits.colocated_draft_tokens))
