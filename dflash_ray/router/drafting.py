"""Who drafts for which sequence. Sans-IO, a part of the scheduler.

The ladder of a step: the sequence's drafter, n-gram lookup, plain decoding. A drafter has one request in flight; what
its sequences want meanwhile goes with the next one. It fetches their context features from the target itself. A draft
that is late is skipped and its drafter keeps the sequence; a drafter that was late several times in a row is left, and
its sequences move to another one, which fetches their features anew.

Nothing here looks at all sequences: a drafter has sets of those that it serves, must still open, and is to draft for.
Entries of the last two are checked when they are used, since sequences move on in the meantime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.draft_blocks import blocks_of
from dflash_ray.pb import drafter_pb2
from dflash_ray.router.actions import Action, DropDrafter, RequestDrafts
from dflash_ray.router.draft_requests import (
    FIRST_BACK_OFF_S,
    DrafterState,
    InFlight,
    Sequences,
    add_opened,
    add_proposals,
    add_tokens,
)
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.sequence import RouterSequence

_MAX_BACK_OFF_S = 10.0
_FULL_PAUSE_S = 1.0  # before a drafter that had no room is offered another sequence
_MAX_CUT_OFFS = 1  # times in a row that a drafter opens a sequence again whose rows were lost
_ROWS_A_TIMEOUT = 64  # context rows for which a drafter gets its time once more
_WAIT_SHARE = 0.5  # of a draft's time, in which a drafter may wait for rows


class Drafting:
    """Drafters and the drafts under way."""

    def __init__(self, config: DflashRayConfig) -> None:
        self._timeout_s = config.router.draft_timeout_ms / 1000
        self._max_misses = config.router.max_missed_drafts
        self._hang_s = config.drafter.step_timeout_s
        self._num_candidates = config.router.num_candidates
        self._drafters: dict[str, DrafterState] = {}
        self._lone: Sequences = {}  # on the target, and without a drafter
        self._waiting: Sequences = {}  # for a draft, by their deadlines; entries without one are over
        self._next_request_id = 1
        self.num_dropped: Counter[str] = Counter()
        self.num_replays = 0

    def join(self, drafter: DrafterState) -> None:
        """A drafter said hello."""
        self._drafters[drafter.drafter_id] = drafter

    def lose(self, drafter_id: str) -> None:
        """A drafter's stream broke: its sequences look for another one, unless they seem to be what breaks drafters."""
        drafter = self._drafters.pop(drafter_id, None)
        if drafter is None:
            return
        in_flight = drafter.in_flight
        for sequence in list(drafter.sequences.values()):
            if in_flight is not None:
                at_work = sequence.sequence_id in in_flight.committed_lens or sequence.sequence_id in in_flight.opened
                sequence.context.num_losses += at_work
            self._leave(sequence)

    def add(self, sequence: RouterSequence) -> None:
        """The step that opens a sequence on the target is sent."""
        if not sequence.draft_tokens:
            return
        drafter = self._drafters.get(sequence.context.drafter_id or "")
        if drafter is None:
            self._lone[sequence.sequence_id] = sequence
        else:
            drafter.to_open[sequence.sequence_id] = sequence

    def close(self, sequence: RouterSequence) -> None:
        """The sequence is over; its drafter is told with the next request."""
        self._waiting.pop(sequence.sequence_id, None)
        self._lone.pop(sequence.sequence_id, None)
        drafter = self._drafters.get(sequence.context.drafter_id or "")
        if drafter is not None:
            drafter.forget(sequence.sequence_id)
            drafter.closed.append(sequence.sequence_id)

    def request(self, idle: Iterable[RouterSequence], limits: TargetLimits, step_id: int, now: float) -> list[Action]:
        """What to ask of drafters.

        Args:
            idle: sequences that have come to want a draft.
            step_id: the last step sent.
        """
        self._assign(now)
        for sequence in idle:
            drafter = self._drafters.get(sequence.context.drafter_id or "")
            if drafter is not None:
                drafter.wanting[sequence.sequence_id] = sequence
                if drafter.in_flight is None or not drafter.in_flight.is_given_up:
                    self._wait(sequence, now)
        actions: list[Action] = []
        for drafter in self._drafters.values():
            if drafter.in_flight is None and (drafter.closed or drafter.to_open or drafter.wanting):
                actions += self._next_request(drafter, limits, step_id, now)
        return actions

    def _assign(self, now: float) -> None:
        """Gives sequences without a drafter to the least loaded that takes any."""
        free = [drafter for drafter in self._drafters.values() if drafter.aside_until <= now] if self._lone else []
        if not free:
            return
        lone, self._lone = self._lone, {}
        for sequence_id, sequence in lone.items():
            if sequence.is_open and sequence.context.may_be_drafted_for:
                drafter = min(free, key=lambda drafter: len(drafter.sequences))
                sequence.context.drafter_id = drafter.drafter_id
                drafter.sequences[sequence_id] = drafter.to_open[sequence_id] = sequence

    def _wait(self, sequence: RouterSequence, now: float) -> None:
        if sequence.draft_deadline is None:
            sequence.draft_deadline = now + self._timeout_s
            self._waiting.pop(sequence.sequence_id, None)
            self._waiting[sequence.sequence_id] = sequence

    def _next_request(self, drafter: DrafterState, limits: TargetLimits, step_id: int, now: float) -> list[Action]:
        """What an idle drafter is to close, to open, and to draft."""
        request = drafter_pb2.DraftRequest(
            request_id=self._next_request_id,
            epoch=limits.epoch,
            close=drafter.closed,
            max_wait_ms=int(1000 * _WAIT_SHARE * self._timeout_s),
            num_candidates=self._num_candidates,
        )
        wanting = [s for s in drafter.wanting.values() if s.wants_draft(limits.max_model_len)]
        lacking = sum(s.committed_len - 1 - s.context.held_rows for s in wanting)
        drafter.wanting, drafter.closed = {}, []
        if drafter.needs_features:
            add_opened(request, self._take_opened(drafter), limits.address, step_id)
        else:
            wanting = self._bring_tokens(request, drafter, wanting)
        for sequence in wanting:
            self._wait(sequence, now)
        add_proposals(request, wanting, limits.max_model_len, drafter.max_draft_tokens)
        if not (request.close or request.open or request.token_sequence_ids or request.sequence_ids):
            return []
        patience_s = self._timeout_s * (1 + lacking / _ROWS_A_TIMEOUT)
        committed_lens = {sequence.sequence_id: sequence.committed_len for sequence in wanting}
        drafter.in_flight = InFlight(
            request.request_id, committed_lens, frozenset(request.open), now, patience_s, now + patience_s
        )
        self._next_request_id += 1
        return [RequestDrafts(drafter.drafter_id, request)]

    def _take_opened(self, drafter: DrafterState) -> list[RouterSequence]:
        """The sequences that a drafter is told to open now."""
        opened = [s for s in drafter.to_open.values() if s.is_open and not s.context.is_open]
        drafter.to_open = {}
        for sequence in opened:
            self.num_replays += sequence.context.is_moved
            sequence.context.is_open, sequence.context.is_moved = True, False
        return opened

    def _bring_tokens(
        self, request: drafter_pb2.DraftRequest, drafter: DrafterState, wanting: list[RouterSequence]
    ) -> list[RouterSequence]:
        """Adds tokens for a drafter that reads them; returns the sequences of which it has all then."""
        drafter.to_open = {}
        whole = []
        for sequence in wanting:
            if add_tokens(request, sequence):
                whole.append(sequence)
            else:  # the next request goes on with them, and no step waits for it
                sequence.draft_deadline = None
                drafter.wanting[sequence.sequence_id] = sequence
        return whole

    def answer(self, drafter_id: str, reply: drafter_pb2.DraftReply, epoch: int | None, now: float) -> None:
        """Takes a drafter's drafts; those for another past are dropped."""
        drafter = self._drafters.get(drafter_id)
        if drafter is None or drafter.in_flight is None or drafter.in_flight.request_id != reply.request_id:
            return
        in_flight, drafter.in_flight = drafter.in_flight, None
        if not in_flight.is_late:
            drafter.num_misses = 0
            drafter.back_off_s = FIRST_BACK_OFF_S
        for block in blocks_of(reply.blocks):
            sequence = drafter.sequences.get(block.sequence_id)
            if sequence is None or reply.blocks.epoch != epoch or block.committed_len != sequence.committed_len:
                self.num_dropped["stale"] += 1
                continue
            sequence.context.held_rows, sequence.context.num_cut_offs = block.committed_len - 1, 0
            if sequence.draft_deadline is None:
                self.num_dropped["late"] += 1
            else:
                sequence.take_draft(block, "remote")
                sequence.draft_deadline = None
        columns = (reply.missing_ids, reply.have_lens, reply.missing_reasons)
        for sequence_id, have_len, reason in zip(*columns, strict=True):
            sequence = drafter.sequences.get(sequence_id)
            if sequence is not None:
                if in_flight.committed_lens.get(sequence_id) == sequence.committed_len:
                    sequence.miss_draft()
                self._miss(drafter, sequence, have_len, reason, now)

    def _miss(
        self,
        drafter: DrafterState,
        sequence: RouterSequence,
        have_len: int,
        reason: drafter_pb2.MissingReason,
        now: float,
    ) -> None:
        """A drafter lacks rows of a sequence."""
        context = sequence.context
        if reason in (drafter_pb2.MISSING_REASON_COMING, drafter_pb2.MISSING_REASON_LOST):
            context.held_rows = have_len
        if reason == drafter_pb2.MISSING_REASON_LOST and drafter.needs_features:
            if not context.is_open:
                return  # the target has opened it anew meanwhile: it is in `to_open`
            context.is_open, context.is_moved = False, True
            context.num_cut_offs += 1
        is_cut_off_again = context.num_cut_offs > _MAX_CUT_OFFS
        if reason == drafter_pb2.MISSING_REASON_REFUSED or is_cut_off_again:
            context.num_refusals += 1
            self._leave(sequence)
            drafter.aside_until = max(drafter.aside_until, now + _FULL_PAUSE_S)
            self.num_dropped["cut_off" if is_cut_off_again else "refused"] += 1
        elif reason == drafter_pb2.MISSING_REASON_LOST and drafter.needs_features:
            drafter.to_open[sequence.sequence_id] = sequence

    def expire(self, now: float) -> list[Action]:
        """Goes on without drafts that are late; leaves drafters that are late all the time or do not answer at all."""
        while (first := self._first_waiting()) is not None and (first.draft_deadline or 0.0) <= now:
            first.miss_draft()
            self.num_dropped["timeout"] += 1
            drafter = self._drafters.get(first.context.drafter_id or "")
            if drafter is not None and drafter.in_flight is not None:
                drafter.in_flight.is_given_up = True
        actions: list[Action] = []
        for drafter in self._drafters.values():
            in_flight = drafter.in_flight
            if in_flight is None or now < in_flight.deadline:
                continue
            in_flight.is_late = True
            in_flight.deadline = now + in_flight.patience_s
            drafter.num_misses += 1
            if drafter.num_misses >= self._max_misses:
                self._put_aside(drafter, now)
            if now - in_flight.sent_at >= self._hang_s:
                actions.append(DropDrafter(drafter.drafter_id))
        return actions

    def _first_waiting(self) -> RouterSequence | None:
        """Who has waited longest for a draft."""
        while self._waiting:
            sequence_id, sequence = next(iter(self._waiting.items()))
            if sequence.draft_deadline is not None:
                return sequence
            del self._waiting[sequence_id]
        return None

    def _put_aside(self, drafter: DrafterState, now: float) -> None:
        """Leaves a drafter for a while; what it holds is closed there with the first request that it gets again."""
        drafter.num_misses = 0
        drafter.aside_until = now + drafter.back_off_s
        drafter.back_off_s = min(_MAX_BACK_OFF_S, 2 * drafter.back_off_s)
        drafter.closed.extend(drafter.sequences)
        for sequence in list(drafter.sequences.values()):
            self._leave(sequence)

    def _leave(self, sequence: RouterSequence) -> None:
        """The sequence's drafter serves it no more; another one may."""
        drafter = self._drafters.get(sequence.context.drafter_id or "")
        if drafter is not None:
            drafter.forget(sequence.sequence_id)
        sequence.leave_drafter()
        self._lone[sequence.sequence_id] = sequence

    def next_deadline(self) -> float | None:
        """When a draft's or a drafter's time is over."""
        deadlines = [d.in_flight.deadline for d in self._drafters.values() if d.in_flight is not None]
        first = self._first_waiting()
        if first is not None and first.draft_deadline is not None:
            deadlines.append(first.draft_deadline)
        return min(deadlines, default=None)
