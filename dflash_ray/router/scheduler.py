"""Continuous batching over one target group, as pure policy: events in, actions out.

Sans-IO: time comes with every event, and there are no sockets, clocks, tasks or Ray here. The same code runs in the
router, under property tests and in simulations. After any event, `poll` says what to do now and `next_deadline` when
to ask again if nothing else happens.

    arrive -> WAITING --admitted--> PREFILL --first token--> DECODE --finish reason, cancel, error--> gone
                 ^                     |                       |
                 +---- preempted, STALE or UNKNOWN, target lost (its tokens stay) ----+

A sequence that waits is in the queue (`requests.py`); all others have a slot, and everything that changes with a step
is in the columns of `SlotTable`. `steps.py` shares out the rows of a step, `in_flight.py` has the steps at the target
and says whose turn it is, `drafting.py` asks drafters, `ngram_drafts.py` looks n-grams up, `speculating.py` says how
many drafts a step is worth. docs/architecture.md has the invariants.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.arrays import Ints, Tokens
from dflash_ray.core.errors import RequestError
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import Action, CloseSequences, DropTarget, Emit, RunStep
from dflash_ray.router.drafting import Drafting
from dflash_ray.router.in_flight import Cohorts, StepsInFlight, choose_ahead
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.requests import Requests
from dflash_ray.router.results import StepOutcome, read_result
from dflash_ray.router.sequence import RouterSequence
from dflash_ray.router.slot_table import DRAFT_SOURCES, MAX_DRAFTS, NEVER, SlotTable
from dflash_ray.router.speculating import Speculating
from dflash_ray.router.steps import StepInFlight, add_colocated, build_step

_NO_SLOTS = np.zeros(0, np.int64)
_STEP_PATIENCE = 1.5  # times the pass's own limit, after which its group should have ended itself


class Scheduler:
    """Requests of one target group, from arrival to their last token.

    Attributes:
        limits: what the target group said; None while there is none.
        speculating: how many drafts each sequence is asked for and verifies.
    """

    def __init__(self, config: DflashRayConfig) -> None:
        self._router = config.router
        self._table = SlotTable(self._router.max_running, 1)
        self.speculating = Speculating(config, self._table)
        self._steps = StepsInFlight(self._router.num_steps_in_flight, _STEP_PATIENCE * config.target.step_timeout_s)
        self._cohorts = Cohorts(self._router.cohorts)
        self.drafting = Drafting(config, self._table)
        self.limits: TargetLimits | None = None
        self.free_pages = 0
        self._actions: list[Action] = []
        self._requests = Requests(
            self._router, self._table, self._steps, self.drafting, self.speculating, self._actions
        )
        self._idle: list[Ints] = []  # slots that have got tokens since drafts were asked for
        self.num_preemptions = 0
        self.num_drafts_by_source: Counter[str] = Counter()
        self.num_draft_tokens = 0
        self.num_accepted_by_position = np.zeros(MAX_DRAFTS, np.int64)

    @property
    def num_running(self) -> int:
        return self._table.num_running

    @property
    def num_waiting(self) -> int:
        return len(self._requests.waiting)

    def arrive(
        self, request: router_pb2.GenerateTokensRequest, now: float, stream: int = 0, call_id: int = 0
    ) -> RouterSequence:
        """Takes a request, with two numbers that come back with its tokens.

        Raises OverloadedError when the queue is full, InvalidRequestError when it can never run.
        """
        return self._requests.arrive(request, self.limits, stream, call_id)

    def cancel(self, sequence: RouterSequence) -> None:
        """The client is gone: the sequence is freed with the next message to the target."""
        if self._requests.by_id.get(sequence.sequence_id) is sequence:
            self._requests.remove(sequence)

    def target_ready(self, limits: TargetLimits, now: float) -> None:
        """A target group said hello; it has no sequences yet, and no slot is in use."""
        if limits.max_model_len != self._table.max_len:
            self._table = SlotTable(self._router.max_running, limits.max_model_len)
            self.drafting.table = self._requests.table = self._table
        self.speculating.begin(self._table, limits)
        self.limits = limits
        self.free_pages = limits.num_pages
        self._requests.target_ready(limits)

    def target_lost(self, now: float) -> None:
        """The stream broke: what ran waits for the group to come back, and what is under way is not answered."""
        self.limits = None
        at_work = [self._table.sequence(slot) for slot in self._steps.lose(self._table).tolist()]
        self._requests.target_lost(at_work, now)
        self._idle.clear()

    def step_done(self, result: target_pb2.StepResult, now: float) -> None:
        """Takes the tokens of the oldest step in flight. Raises ValueError for a result that is not about it."""
        step = self._steps.take(result.step_id, now)
        outcome = read_result(result, step)
        self.free_pages = result.free_pages
        for part in result.prompt_logprobs:
            if part.sequence_id in self._requests.by_id:
                self._actions.append(Emit.one(self._requests.by_id[part.sequence_id], prompt_logprobs=part))
        is_current = step.is_current(self._table)
        is_known = is_current & outcome.is_ok
        if step.num_rows_of_drafts:
            self.num_draft_tokens += int(outcome.num_drafts.sum())
        self.speculating.done(step, outcome, is_known, now, result.timings)
        self._table.end_step(step.slots[is_current], outcome.is_ok[is_current])
        entries = is_known.nonzero()[0]
        self._advance(step, outcome, entries)
        if len(entries) < len(is_known):
            self._take_failures(step, outcome, (is_current & ~is_known).nonzero()[0])

    def _take_failures(self, step: StepInFlight, outcome: StepOutcome, entries: Ints) -> None:
        """Ends or starts anew what these entries have not done."""
        lacks_pages = False
        for entry in entries.tolist():
            sequence = self._table.sequence(int(step.slots[entry]))
            if outcome.statuses[entry] == target_pb2.ENTRY_STATUS_NO_PAGES:
                lacks_pages = True
            elif outcome.statuses[entry] == target_pb2.ENTRY_STATUS_FAILED:
                self._requests.fail(sequence, RequestError(outcome.errors[entry]))
            else:  # the target has another past or none: start again with the tokens known here
                self._requests.requeue(sequence)
        if lacks_pages:
            self._free_pages(step)

    def _advance(self, step: StepInFlight, outcome: StepOutcome, entries: Ints) -> None:
        """Takes what these entries have computed and committed."""
        table = self._table
        slots, counts = step.slots[entries], outcome.num_tokens[entries]
        is_too_long = table.committed_lens[slots] + counts > table.max_lens[slots]
        if np.count_nonzero(is_too_long):
            for slot in slots[is_too_long].tolist():
                self._requests.fail(
                    table.sequence(slot), RequestError("the target group gave more tokens than were asked for")
                )
            entries, slots, counts = entries[~is_too_long], slots[~is_too_long], counts[~is_too_long]
        token_ids = outcome.tokens_of(entries)
        num_chunks = int(np.count_nonzero(entries < step.num_chunks)) if step.num_chunks else 0  # they come first
        self._judge_ngrams(slots, counts, token_ids, num_chunks)
        if num_chunks:
            chunks = slots[:num_chunks]
            table.num_prefilled[chunks] = outcome.kv_lens[entries[:num_chunks]]
            table.num_cached[chunks] = outcome.cached_lens[entries[:num_chunks]]
            table.start_decoding(chunks[counts[:num_chunks] > 0])
        table.commit(slots, counts, token_ids)
        self._emit(step, outcome, entries, token_ids)
        self._idle.append(slots)

    def _judge_ngrams(self, slots: Ints, counts: Ints, token_ids: Tokens, num_chunks: int) -> None:
        """Slots, of which the first are prompts' chunks, have got tokens: what was looked up for them is over."""
        ngrams = self.speculating.ngrams
        if ngrams.has_looked_up:
            is_decoded = counts[num_chunks:] > 0
            firsts = (counts.cumsum() - counts)[num_chunks:][is_decoded]
            self.speculating.judge_ngrams(slots[num_chunks:][is_decoded], token_ids[firsts])
            ngrams.forget(slots)

    def _emit(self, step: StepInFlight, outcome: StepOutcome, entries: Ints, token_ids: Tokens) -> None:
        """Tells the requests, and ends those that are finished."""
        table = self._table
        told, is_decode_pass = entries, np.ones(len(entries), np.bool_)
        if step.num_chunks:
            told = entries[(outcome.num_tokens[entries] > 0) | (outcome.finish_reasons[entries] > 0)]
            is_decode_pass = told >= step.num_chunks
        if not len(told):
            return
        num_accepted = outcome.num_accepted[told]
        if step.num_rows_of_drafts:
            by_count = np.bincount(num_accepted, minlength=MAX_DRAFTS + 1)[1 : MAX_DRAFTS + 1]
            self.num_accepted_by_position += by_count[::-1].cumsum()[::-1]
        slots, reasons = step.slots[told], outcome.finish_reasons[told]
        logprobs, cached = {}, {}
        if outcome.logprobs:
            logprobs = {i: outcome.logprobs[e] for i, e in enumerate(told.tolist()) if e in outcome.logprobs}
        if step.num_chunks:
            num_cached = np.where(is_decode_pass, 0, table.num_cached[slots])
            cached = {i: int(num_cached[i]) for i in num_cached.nonzero()[0].tolist()}
        self._actions.append(
            Emit(
                step.ids[told],
                table.streams[slots],
                table.call_ids[slots],
                outcome.num_tokens[told],
                token_ids,
                reasons,
                is_decode_pass,
                outcome.num_drafts[told],
                num_accepted,
                table.draft_tokens[slots],
                logprobs,
                num_cached_tokens=cached,
            )
        )
        if np.count_nonzero(reasons):
            for slot in slots[reasons > 0].tolist():
                self._requests.remove(table.sequence(slot))

    def _free_pages(self, step: StepInFlight) -> None:
        """Entries found no pages: the youngest sequence is put back, one a step; a lone one has filled the cache."""
        if self._requests.closed_after >= step.step_id:
            return  # the pages of those are on their way: what failed tries again first
        youngest = self._requests.by_id[int(self._table.ids.max())]
        if self.num_running == 1:
            self._actions.append(Emit.one(youngest, finish_reason=common_pb2.FINISH_REASON_LENGTH))
            self._requests.remove(youngest)
            return
        self.num_preemptions += 1
        self._requests.requeue(youngest)

    def drafter_lost(self, drafter_id: str) -> None:
        self.drafting.lose(drafter_id)

    def drafts_done(self, drafter_id: str, reply: drafter_pb2.DraftReply, now: float) -> None:
        """Takes a drafter's answer. Raises ValueError for one whose columns do not belong together."""
        self.drafting.answer(drafter_id, reply, self.limits, now)

    def poll(self, now: float) -> list[Action]:
        """Everything there is to do at `now`, in order."""
        self._requests.give_up(now)
        self._actions += self.drafting.expire(now)
        self.speculating.ngrams.make_room()
        if self.limits is not None:
            self._requests.admit(self.limits, self.free_pages, self._cohorts)
            self._request_drafts(self.limits, now)
            while self._start_step(self.limits, now):
                pass
            if now >= self._steps.deadline:
                self._actions.append(DropTarget())
            if self._requests.to_close:  # no step takes them along
                self._actions.append(CloseSequences(self._requests.take_closes()))
        actions = list(self._actions)
        self._actions.clear()
        return actions

    def learn(self) -> None:
        """Takes in what the last step teaches the policy, as far as that can wait until the next one is sent.

        It may come at any time, or never: the next result makes up for it.
        """
        self.speculating.controller.learn()

    @property
    def has_lesson(self) -> bool:
        """Whether `learn` has something to do that the next result would make a target wait for which has no step."""
        return self.speculating.controller.has_lesson and not len(self._steps)

    def next_deadline(self) -> float | None:
        """When `poll` has something to do even if no event comes."""
        deadline = min(self.drafting.next_deadline(), self._steps.deadline, self._requests.deadline)
        return None if deadline == NEVER else deadline

    def hand_over(self, reason: str) -> None:
        """Ends every request with a HandedOverError: who sent them takes them elsewhere."""
        self._requests.hand_over(reason)

    def _request_drafts(self, limits: TargetLimits, now: float) -> None:
        """Asks drafters for what the slots are worth that have got tokens."""
        came, self._idle = self._idle, []
        if limits.colocated_draft_tokens:
            return  # the step asks
        idle = _NO_SLOTS
        if came:
            idle = came[0] if len(came) == 1 else np.concatenate(came)
            idle = idle[self._table.lacks_draft(idle)]
        if len(idle):
            idle = self.speculating.ask(idle, self.drafting.reach, limits, now)
        opens_all = self.speculating.controller.expects_drafts
        if not opens_all:
            self.drafting.rest()
        self._actions += self.drafting.request(idle, limits, self._steps.last_id, opens_all, now)

    def _start_step(self, limits: TargetLimits, now: float) -> bool:
        """Sends the next step when a cohort has all its drafts or has waited long enough for them."""
        chosen = self._next_step(limits, now)
        if chosen is None:
            return False
        decoding, prefilling, is_alone = chosen
        counts, least_log_prob = self.speculating.cut(decoding, limits)
        message, step = build_step(
            self._steps.last_id + 1,
            limits,
            self._router,
            self._table,
            decoding,
            prefilling,
            counts,
            is_alone=is_alone,
            least_own_log_prob=least_log_prob,
        )
        message.close.extend(self._requests.take_closes())
        num_asked = self.speculating.ask_inside(step, message.is_ahead, limits, now)
        add_colocated(message, self._table, step.slots, num_asked)
        self.speculating.sent(decoding, step, now, num_asked)
        self._steps.add(step, now)
        self._count_drafts(step)
        self._actions.append(RunStep(message, step.num_rows))
        if message.open:
            for opened in message.open:
                self.drafting.add(self._requests.by_id[opened.sequence_id])
            self._request_drafts(limits, now)  # drafters are told of them at once
        return True

    def _next_step(self, limits: TargetLimits, now: float) -> tuple[Ints, Ints, bool] | None:
        """Slots to decode and to prefill, and whether a suspect is alone; None while there is no next step to send."""
        before = self._steps.only
        if before is not None and self._router.runs_ahead:
            ahead = choose_ahead(self._table, before)
            if ahead is not None and self.speculating.is_known(ahead[0], self.drafting.reach, limits, now):
                return (*ahead, False)
        if not self._steps.has_room:
            return None
        return self._cohorts.choose(self._table, is_target_idle=not len(self._steps))

    def _count_drafts(self, step: StepInFlight) -> None:
        by_source = [len(step.chains)]  # which is PLAIN's
        if step.num_rows_of_drafts:
            by_source = np.bincount(self._table.draft_sources[step.chains]).tolist()
        for source, count in enumerate(by_source):
            if count:
                self.num_drafts_by_source[DRAFT_SOURCES[source]] += count
