"""Who drafts for which sequence. Sans-IO, a part of the scheduler.

The ladder of a step: the sequence's drafter, n-gram lookup, plain decoding. A drafter has one request in flight; what
its sequences want meanwhile goes with the next one. It fetches their context features from the target itself. A draft
that is late is skipped and its drafter keeps the sequence; a drafter that was late several times in a row is left, and
its sequences move to another one, which fetches their features anew.

A sequence's drafter is in its context for as long as it lives, and in the table's column while the target has it open.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.arrays import Ints
from dflash_ray.core.draft_blocks import BlockColumns
from dflash_ray.pb import common_pb2, drafter_pb2
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
from dflash_ray.router.slot_table import MAX_DRAFTS, NEVER, NO_DRAFTER, REMOTE, SlotTable
from dflash_ray.router.speculation.records import Policy

_MAX_BACK_OFF_S = 10.0
_FULL_PAUSE_S = 1.0  # before a drafter that had no room is offered another sequence
_MAX_CUT_OFFS = 1  # times in a row that a drafter opens a sequence again whose rows were lost
_ROWS_A_TIMEOUT = 64  # context rows for which a drafter gets its time once more
_WAIT_SHARE = 0.5  # of a draft's time, in which a drafter may wait for rows


class Drafting:
    """Drafters and the drafts under way.

    Attributes:
        table: the slots of the sequences on the target; the scheduler's.
    """

    def __init__(self, config: DflashRayConfig, table: SlotTable) -> None:
        self.table = table
        self._timeout_s = config.router.draft_timeout_ms / 1000
        self._max_misses = config.router.max_missed_drafts
        self._hang_s = config.drafter.step_timeout_s
        self._tree_width = config.router.tree_width
        self._drafters: dict[str, DrafterState] = {}
        self._lone: Sequences = {}  # on the target, and without a drafter
        self._num_joined = 0
        self._next_request_id = 1
        self.num_dropped: Counter[str] = Counter()
        self.num_replays = 0

    def join(self, drafter: DrafterState) -> None:
        """A drafter said hello."""
        drafter.number = self._num_joined
        if self._tree_width > 1 and drafter.needs_features:
            drafter.max_draft_tokens = MAX_DRAFTS  # its block says how deep a tree is, not how many nodes it has
        self._num_joined += 1
        self._drafters[drafter.drafter_id] = drafter

    def reach(self, slots: Ints, now: float) -> Ints:
        """Drafts that each slot's drafter can give, or any that takes sequences now where it has none; 0 for none.

        None drafts for a sequence that was opened without context features.
        """
        lens = np.zeros(self._num_joined + 1, np.int64)  # by the drafter's number; the last place is NO_DRAFTER's
        for drafter in self._drafters.values():
            if drafter.in_flight is None or not drafter.in_flight.is_given_up:
                lens[drafter.number] = drafter.max_draft_tokens
                if drafter.aside_until <= now:
                    lens[-1] = max(lens[-1], drafter.max_draft_tokens)
        of_slots: Ints = lens[self.table.drafters[slots]] * self.table.may_be_drafted[slots]
        return of_slots

    def lose(self, drafter_id: str) -> None:
        """A drafter's stream broke: its sequences look for another one, unless they seem to be what breaks drafters."""
        drafter = self._drafters.pop(drafter_id, None)
        if drafter is None:
            return
        in_flight = drafter.in_flight
        for sequence_id, sequence in list(drafter.sequences.items()):
            if in_flight is not None:
                at_work = in_flight.asked_at(sequence_id) is not None or sequence_id in in_flight.opened
                sequence.context.num_losses += at_work
            self._leave(drafter, sequence)

    def add(self, sequence: RouterSequence) -> None:
        """The step that opens a sequence on the target is sent."""
        assert sequence.slot is not None
        if not self.table.may_be_drafted[sequence.slot]:
            return
        drafter = self._drafters.get(sequence.context.drafter_id or "")
        if drafter is None:
            self._lone[sequence.sequence_id] = sequence
        else:
            self._serve(drafter, sequence)

    def _serve(self, drafter: DrafterState, sequence: RouterSequence) -> None:
        """From now on the drafter drafts for an open sequence."""
        sequence.context.drafter_id = drafter.drafter_id
        drafter.sequences[sequence.sequence_id] = drafter.to_open[sequence.sequence_id] = sequence
        self.table.drafters[sequence.slot] = drafter.number

    def suspend(self, sequence: RouterSequence) -> None:
        """The target is to forget the sequence, which goes back to the queue."""
        sequence.context.is_open = False
        self._lone.pop(sequence.sequence_id, None)

    def close(self, sequence: RouterSequence) -> None:
        """The sequence is over; its drafter is told with the next request."""
        self._lone.pop(sequence.sequence_id, None)
        drafter = self._drafters.get(sequence.context.drafter_id or "")
        if drafter is not None:
            drafter.forget(sequence.sequence_id)
            drafter.closed.append(sequence.sequence_id)

    def request(self, idle: Ints, limits: TargetLimits, step_id: int, opens_all: bool, now: float) -> list[Action]:
        """What to ask of drafters.

        Args:
            idle: slots that have come to want drafts, `num_asked` of the table's.
            step_id: the last step sent.
            opens_all: sequences get a drafter before they want drafts, so that it has their rows by then.
        """
        if not self._drafters:
            return []
        self._assign(idle, opens_all, now)
        table, actions = self.table, []
        table.is_asking[idle[table.drafters[idle] != NO_DRAFTER]] = True
        has_asking = np.count_nonzero(table.is_asking)
        for drafter in self._drafters.values():
            if len(idle) and (drafter.in_flight is None or not drafter.in_flight.is_given_up):
                self._wait(idle[table.drafters[idle] == drafter.number], now)
            if drafter.in_flight is None:
                is_its = table.is_asking & (table.drafters == drafter.number) if has_asking else table.is_asking
                asking = is_its.nonzero()[0]
                if len(asking) or drafter.closed or drafter.to_open:
                    actions += self._next_request(drafter, asking, limits, step_id, now)
        return actions

    def _assign(self, idle: Ints, opens_all: bool, now: float) -> None:
        """Gives sequences without a drafter to the least loaded that takes any."""
        if not self._lone or not (opens_all or len(idle) or self._has_lone_fixed):
            return
        free = [drafter for drafter in self._drafters.values() if drafter.aside_until <= now]
        if not free:
            return
        wanting = set() if opens_all else set(idle.tolist())
        lone, self._lone = self._lone, {}
        for sequence_id, sequence in lone.items():
            if sequence.slot is None or not sequence.context.may_be_drafted_for:
                continue
            if opens_all or sequence.policy == Policy.FIXED or sequence.slot in wanting:
                self._serve(min(free, key=lambda drafter: len(drafter.sequences)), sequence)
            else:
                self._lone[sequence_id] = sequence

    @property
    def _has_lone_fixed(self) -> bool:
        return any(sequence.policy == Policy.FIXED for sequence in self._lone.values())

    def rest(self) -> None:
        """Closes the sessions of adaptive sequences; they are opened anew when drafts are expected again."""
        for drafter in self._drafters.values():
            for sequence in [s for s in drafter.sequences.values() if s.policy == Policy.ADAPTIVE]:
                drafter.closed.append(sequence.sequence_id)
                self._leave(drafter, sequence)

    def _wait(self, slots: Ints, now: float) -> None:
        deadlines = self.table.draft_deadlines
        deadlines[slots] = np.minimum(deadlines[slots], now + self._timeout_s)

    def _next_request(
        self,
        drafter: DrafterState,
        asking: Ints,
        limits: TargetLimits,
        step_id: int,
        now: float,
    ) -> list[Action]:
        """What an idle drafter is to close, to open, and to draft."""
        table = self.table
        request = drafter_pb2.DraftRequest(
            request_id=self._next_request_id,
            epoch=limits.epoch,
            close=drafter.closed,
            max_wait_ms=int(1000 * _WAIT_SHARE * self._timeout_s),
            tree_width=self._tree_width,
        )
        drafter.closed = []
        table.is_asking[asking] = False
        slots = asking[table.lacks_draft(asking)]
        lacking = int((table.committed_lens[slots] - 1 - table.held_rows[slots]).sum())
        if drafter.needs_features:
            add_opened(request, self._take_opened(drafter), limits.address, step_id)
        else:
            drafter.to_open = {}
            whole = add_tokens(request, table, slots)
            partial = np.setdiff1d(slots, whole)
            table.is_asking[partial] = True  # the next request goes on with them, and no step waits for it
            table.draft_deadlines[partial] = NEVER
            slots = whole
        self._wait(slots, now)
        slots = slots[np.argsort(table.ids[slots])]
        add_proposals(request, table, slots, np.minimum(table.num_asked[slots], drafter.max_draft_tokens))
        if not (request.close or request.open or request.token_sequence_ids or request.sequence_ids):
            return []
        patience_s = self._timeout_s * (1 + lacking / _ROWS_A_TIMEOUT)
        drafter.in_flight = InFlight(
            request.request_id,
            slots,
            table.ids[slots],
            table.committed_lens[slots],
            frozenset(request.open),
            now,
            patience_s,
            now + patience_s,
        )
        self._next_request_id += 1
        return [RequestDrafts(drafter.drafter_id, request)]

    def _take_opened(self, drafter: DrafterState) -> list[RouterSequence]:
        """The sequences that a drafter is told to open now."""
        opened = [s for s in drafter.to_open.values() if s.slot is not None and not s.context.is_open]
        drafter.to_open = {}
        for sequence in opened:
            context = sequence.context
            self.num_replays += context.is_moved
            context.is_open, context.was_open, context.is_moved = True, True, False
        return opened

    def answer(self, drafter_id: str, reply: drafter_pb2.DraftReply, limits: TargetLimits | None, now: float) -> None:
        """Takes a drafter's drafts; those for another past are dropped."""
        drafter = self._drafters.get(drafter_id)
        if drafter is None or drafter.in_flight is None or drafter.in_flight.request_id != reply.request_id:
            return
        in_flight, drafter.in_flight = drafter.in_flight, None
        if not in_flight.is_late:
            drafter.num_misses = 0
            drafter.back_off_s = FIRST_BACK_OFF_S
        if len(in_flight.ids):
            self._take(drafter, in_flight, reply.blocks, limits)
        columns = (reply.missing_ids, reply.have_lens, reply.missing_reasons)
        for sequence_id, have_len, reason in zip(*columns, strict=True):
            sequence = drafter.sequences.get(sequence_id)
            if sequence is not None:
                if sequence.slot is not None and in_flight.asked_at(sequence_id) == sequence.committed_len:
                    self.table.miss_drafts(np.array([sequence.slot]))
                self._miss(drafter, sequence, have_len, reason, now)

    def _take(
        self,
        drafter: DrafterState,
        in_flight: InFlight,
        message: common_pb2.DraftBlocks,
        limits: TargetLimits | None,
    ) -> None:
        table, blocks = self.table, BlockColumns.of(message)
        slots = in_flight.slots[in_flight.places(blocks.sequence_ids)]
        is_right = (table.ids[slots] == blocks.sequence_ids) & (table.drafters[slots] == drafter.number)
        is_right &= table.committed_lens[slots] == blocks.committed_lens
        if limits is None or message.epoch != limits.epoch:
            is_right[:] = False
        num_right = int(np.count_nonzero(is_right))
        self._drop("stale", len(slots) - num_right)
        if limits is None or not num_right:
            return
        right = slots[is_right]
        table.held_rows[right] = blocks.committed_lens[is_right] - 1
        table.num_cut_offs[right] = 0
        is_awaited = is_right & (table.draft_deadlines[slots] < NEVER)
        self._drop("late", num_right - int(np.count_nonzero(is_awaited)))
        table.take_blocks(slots, blocks, is_awaited, REMOTE, limits.vocab_size)

    def _miss(
        self,
        drafter: DrafterState,
        sequence: RouterSequence,
        have_len: int,
        reason: drafter_pb2.MissingReason,
        now: float,
    ) -> None:
        """A drafter lacks rows of a sequence."""
        context, table, slot = sequence.context, self.table, sequence.slot
        is_lost = reason == drafter_pb2.MISSING_REASON_LOST
        if slot is not None and (is_lost or reason == drafter_pb2.MISSING_REASON_COMING):
            table.held_rows[slot] = have_len
        is_cut_off_again = False
        if is_lost and drafter.needs_features:
            if slot is None or not context.is_open:
                return  # the target has opened it anew meanwhile, or will: then it is in `to_open`
            context.is_open, context.is_moved = False, True
            table.num_cut_offs[slot] += 1
            is_cut_off_again = bool(table.num_cut_offs[slot] > _MAX_CUT_OFFS)
        if reason == drafter_pb2.MISSING_REASON_REFUSED or is_cut_off_again:
            context.num_refusals += 1
            self._leave(drafter, sequence)
            drafter.aside_until = max(drafter.aside_until, now + _FULL_PAUSE_S)
            self._drop("cut_off" if is_cut_off_again else "refused", 1)
        elif is_lost and drafter.needs_features:
            drafter.to_open[sequence.sequence_id] = sequence

    def _drop(self, reason: str, count: int) -> None:
        if count:
            self.num_dropped[reason] += count

    def expire(self, now: float) -> list[Action]:
        """Goes on without drafts that are late; leaves drafters that are late all the time or do not answer at all."""
        if not self._drafters:  # nor does any slot wait for one then
            return []
        late = (self.table.draft_deadlines <= now).nonzero()[0]
        if len(late):
            self.table.miss_drafts(late)
            self._drop("timeout", len(late))
            numbers = set(self.table.drafters[late].tolist())
            for drafter in self._drafters.values():
                if drafter.number in numbers and drafter.in_flight is not None:
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

    def _put_aside(self, drafter: DrafterState, now: float) -> None:
        """Leaves a drafter for a while; what it holds is closed there with the first request that it gets again."""
        drafter.num_misses = 0
        drafter.aside_until = now + drafter.back_off_s
        drafter.back_off_s = min(_MAX_BACK_OFF_S, 2 * drafter.back_off_s)
        drafter.closed.extend(drafter.sequences)
        for sequence in list(drafter.sequences.values()):
            self._leave(drafter, sequence)

    def _leave(self, drafter: DrafterState, sequence: RouterSequence) -> None:
        """The drafter serves the sequence no more; another one may."""
        drafter.forget(sequence.sequence_id)
        if sequence.slot is not None:
            self.table.leave_drafter(sequence.slot)
            if self.table.is_open[sequence.slot]:
                self._lone[sequence.sequence_id] = sequence
        sequence.context.leave()

    def next_deadline(self) -> float:
        """When a draft's or a drafter's time is over; NEVER when nothing is waited for."""
        if not self._drafters:
            return NEVER
        in_flight = [d.in_flight.deadline for d in self._drafters.values() if d.in_flight is not None]
        return min([float(self.table.draft_deadlines.min()), *in_flight])
