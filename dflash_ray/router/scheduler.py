"""Continuous batching over one target group, as pure policy: events in, actions out.

Sans-IO: time comes with every event, and there are no sockets, clocks, tasks or Ray here. The same code runs in the
router, under property tests and in simulations. After any event, `poll` says what to do now and `next_deadline` when
to ask again if nothing else happens.
"""

from __future__ import annotations

from collections import Counter, deque

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.errors import DeadlineExceededError, HandedOverError, OverloadedError, RequestError
from dflash_ray.core.ngram import IndexingRoom
from dflash_ray.core.stats import DecodePass
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import Action, CloseSequences, DropTarget, Emit, Fail, RunStep
from dflash_ray.router.draft_rates import DraftRates
from dflash_ray.router.drafting import Drafting
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.sequence import Phase, RouterSequence
from dflash_ray.router.steps import build_step

_MAX_LOSSES = 2  # groups that may die over a sequence before it runs alone, where one more ends it
_STEP_PATIENCE = 1.5  # times the pass's own limit, after which its group should have ended itself
_INDEXED_AT_ONCE = 2048  # tokens of long texts that one poll indexes for n-grams: some two milliseconds


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
        self._step_timeout_s = _STEP_PATIENCE * config.target.step_timeout_s
        self.drafting = Drafting(config)
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
        self._step_deadline = 0.0
        self._closes_since_step = False
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
            self.limits.check_fits(request)
        draft_tokens = self._draft_tokens(request.speculation)
        sequence = RouterSequence(
            sequence_id=self._next_id,
            request=request,
            tokens=list(request.token_ids),
            draft_tokens=draft_tokens,
            wants_features=self._wants_features and draft_tokens > 0,
            arrived_at=now,
            num_losses=request.num_losses,
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

    def target_ready(self, limits: TargetLimits, now: float) -> None:
        """A target group said hello; it has no sequences yet."""
        self.limits = limits
        self.free_pages = limits.num_pages
        self._lost_at = None
        for sequence in list(self._waiting):
            try:
                limits.check_fits(sequence.request)
            except RequestError as error:
                self._fail(sequence, error)

    def target_lost(self, now: float) -> None:
        """The stream broke: what ran waits, with its tokens, for the group to come back.

        A sequence whose steps end group after group is a suspect: it then runs alone, and ends with the next one.
        """
        entries = list((self._step or {}).values())
        self.limits = None
        self._step = None
        self._lost_at = now
        for sequence in entries:
            if sequence.sequence_id not in self._sequences or not sequence.in_step:
                continue  # cancelled or preempted meanwhile
            sequence.num_losses += 1
            if sequence.num_losses > _MAX_LOSSES:
                self._fail(sequence, RequestError("the target group ended three times while it ran this request"))
        for sequence in reversed(self._running):
            sequence.leave_target()
            self._waiting.appendleft(sequence)
        self._running.clear()
        self._close_next.clear()

    def features(self, part: common_pb2.ContextFeatures) -> None:
        """Context features of the step in flight, before its result."""
        sequence = self._sequences.get(part.sequence_id)
        if sequence is not None and sequence.is_open:
            sequence.context.take(part)

    def step_done(self, result: target_pb2.StepResult, now: float) -> None:
        """Takes the tokens of a step."""
        entries = self._step or {}
        self._step = None
        self.free_pages = result.free_pages
        for part in result.prompt_logprobs:
            if part.sequence_id in self._sequences:
                scored = self._sequences[part.sequence_id]
                unfinished = common_pb2.FINISH_REASON_UNSPECIFIED
                self._actions.append(Emit(scored, [], None, unfinished, prompt_logprobs=part))
        logprobs = iter(result.logprobs)
        errors = iter(result.errors)
        lacks_pages = False
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
            if result.statuses[i] == target_pb2.ENTRY_STATUS_OK:
                try:
                    decode_pass = self._advance(sequence, tokens, result.num_accepted_drafts[i], now)
                except Exception as fault:  # its neighbours are not concerned
                    self._fail(sequence, _internal_error(fault))
                    continue
                self._emit(sequence, tokens, token_logprobs, result.finish_reasons[i], decode_pass)
            elif result.statuses[i] == target_pb2.ENTRY_STATUS_NO_PAGES:
                lacks_pages = True
            elif result.statuses[i] == target_pb2.ENTRY_STATUS_FAILED:
                self._fail(sequence, RequestError(error))
            else:  # the target has another past or none: start again with the tokens known here
                self._requeue(sequence)
        if lacks_pages:
            self._free_pages()
        for block in result.colocated_drafts:
            drafted = self._sequences.get(block.sequence_id)
            if drafted is not None and drafted.committed_len == block.committed_len:
                drafted.take_draft(block, "colocated")

    def _advance(self, sequence: RouterSequence, tokens: list[int], num_accepted: int, now: float) -> DecodePass | None:
        decode_pass = None
        if sequence.phase is Phase.DECODE:
            decode_pass = DecodePass(
                num_drafts=len(sequence.draft or ()),
                num_accepted_drafts=num_accepted,
                num_spec_tokens=sequence.draft_tokens,
            )
            if tokens:
                self._judge_drafts(sequence, tokens[0])
        else:
            sequence.num_prefilled += sequence.rows_in_step
            if tokens:
                sequence.phase = Phase.DECODE
                sequence.decoding_since = sequence.decoding_since or now
        sequence.append(tokens)
        return decode_pass

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
        decode_pass: DecodePass | None,
    ) -> None:
        if tokens:
            self._actions.append(Emit(sequence, tokens, logprobs, finish_reason, decode_pass))
        if finish_reason:
            self._remove(sequence)

    def _free_pages(self) -> None:
        """Entries found no pages: the youngest sequence is put back, one a step; a lone one has filled the cache."""
        if self._closes_since_step:
            return  # the pages of those are on their way: what failed tries again first
        if len(self._running) == 1:
            sequence = self._running[0]
            self._actions.append(Emit(sequence, [], None, common_pb2.FINISH_REASON_LENGTH))
            self._remove(sequence)
            return
        youngest = max(self._running, key=lambda other: other.sequence_id)
        youngest.num_preemptions += 1
        self.num_preemptions += 1
        self._requeue(youngest)

    def _requeue(self, sequence: RouterSequence) -> None:
        self._running.remove(sequence)
        self._close(sequence)
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
            self._close(sequence)

    def _close(self, sequence: RouterSequence) -> None:
        """The target is to forget the sequence, with the next message."""
        if sequence.is_open:
            self._close_next.append(sequence.sequence_id)
            self._closes_since_step = True

    def drafter_lost(self, drafter_id: str) -> None:
        self.drafting.lose(drafter_id, self._sequences.values())

    def drafts_done(self, drafter_id: str, reply: drafter_pb2.DraftReply, now: float) -> None:
        epoch = self.limits.epoch if self.limits is not None else None
        self.drafting.answer(drafter_id, reply, self._sequences, epoch, now)

    def replayed(self, part: common_pb2.ContextFeatures) -> None:
        """Context features that were asked for again."""
        sequence = self._sequences.get(part.sequence_id)
        if sequence is not None and sequence.context.is_replaying:
            sequence.context.is_replaying = False
            sequence.context.take(part)
            if not part.num_rows:
                sequence.context.lacked_at = sequence.num_computed

    def poll(self, now: float) -> list[Action]:
        """Everything there is to do at `now`, in order."""
        self._give_up_waiting(now)
        self._actions += self.drafting.expire(self._sequences.values(), now)
        self._indexing_room.left = _INDEXED_AT_ONCE
        if self.limits is not None:
            self._admit(now)
            if self._weighs_ngrams:
                self._prefer_ngrams()
            if not self._is_colocated:
                self._actions += self.drafting.request(self._running, self.limits.max_model_len, self.limits.epoch, now)
            if self._step is None:
                self._start_step(now)
            elif now >= self._step_deadline:
                self._actions.append(DropTarget())
            if self._close_next:  # no step takes them along
                self._actions.append(CloseSequences(self._close_next))
                self._close_next = []
        actions, self._actions = self._actions, []
        return actions

    def _prefer_ngrams(self) -> None:
        """Gives sequences whose tokens have just come an n-gram in a drafter's place, where that promises more."""
        assert self.limits is not None
        for sequence in self._running:
            if sequence.ngram_draft is not None or not sequence.wants_draft(self.limits.max_model_len):
                continue
            count = sequence.num_drafts(self.limits.max_model_len)
            if self._rates.prefers_ngram(sequence.look_up(count, self._indexing_room).match_len):
                sequence.take_ngram(count, self._indexing_room)

    def next_deadline(self) -> float | None:
        """When `poll` has something to do even if no event comes."""
        deadlines = [s.draft_deadline for s in self._running if s.draft_deadline is not None]
        drafter_deadline = self.drafting.next_deadline()
        if drafter_deadline is not None:
            deadlines.append(drafter_deadline)
        if self._step is not None:
            deadlines.append(self._step_deadline)
        if self._lost_at is not None and self._waiting:
            deadlines.append(self._lost_at + self._router.target_wait_s)
        return min(deadlines, default=None)

    def _give_up_waiting(self, now: float) -> None:
        wait_s = self._router.target_wait_s
        if self._lost_at is not None and now >= self._lost_at + wait_s:
            for sequence in list(self._waiting):
                self._fail(sequence, DeadlineExceededError(f"no target group came back within {wait_s:g} s"))

    def hand_over(self, reason: str) -> None:
        """Ends every request with a HandedOverError: who sent them takes them elsewhere."""
        for sequence in list(self._sequences.values()):
            self._fail(sequence, HandedOverError(reason, sequence.num_losses))

    def _admit(self, now: float) -> None:
        """Moves waiting sequences to the target while their tokens and a block for each running one fit."""
        limits = self.limits
        assert limits is not None
        while self._waiting and len(self._running) < self._router.max_running:
            sequence = self._waiting[0]
            promised = sum(
                limits.pages(s.committed_len + 1) - limits.pages(s.num_prefilled)
                for s in self._running
                if s.phase is Phase.PREFILL
            )
            margin = sum(1 for s in self._running if s.phase is Phase.DECODE)
            needed = limits.pages(sequence.committed_len + 1 + sequence.draft_tokens)
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
            suspects = [s for s in (*decoding, *prefilling) if s.num_losses >= _MAX_LOSSES]
            if suspects:
                decoding, prefilling = _apart(decoding, prefilling, suspects)
            self._actions.append(RunStep(self._send_step(decoding, prefilling, now)))

    def _send_step(
        self, decoding: list[RouterSequence], prefilling: list[RouterSequence], now: float
    ) -> target_pb2.Step:
        limits = self.limits
        assert limits is not None
        self._step_id += 1
        for sequence in decoding:
            count = sequence.num_drafts(limits.max_model_len)
            if sequence.draft is None and count and self._uses_ngram:
                sequence.take_ngram(count, self._indexing_room)
        step, entries = build_step(self._step_id, limits, self._router, decoding, prefilling)
        step.close.extend(self._close_next)
        self._close_next = []
        self._closes_since_step = False
        self._step_deadline = now + self._step_timeout_s
        self._step = {sequence.sequence_id: sequence for sequence in entries}
        for sequence in entries:
            sequence.in_step = True
            sequence.last_step = self._step_id
            if sequence.phase is Phase.DECODE:
                self.num_drafts_by_source[sequence.draft_source] += 1
                self.num_draft_tokens += len(sequence.draft or ())
        return step


def _internal_error(cause: Exception) -> RequestError:
    error = RequestError("this request met an internal error; the log of the router says which")
    error.__cause__ = cause
    return error


def _apart(
    decoding: list[RouterSequence], prefilling: list[RouterSequence], suspects: list[RouterSequence]
) -> tuple[list[RouterSequence], list[RouterSequence]]:
    """The others together, or one suspect by itself: whoever waited longest."""
    others = [s for s in (*decoding, *prefilling) if s not in suspects]
    suspect = min(suspects, key=lambda sequence: sequence.last_step)
    if others and min(other.last_step for other in others) <= suspect.last_step:
        return [s for s in decoding if s not in suspects], [s for s in prefilling if s not in suspects]
    return [s for s in decoding if s is suspect], [s for s in prefilling if s is suspect]
