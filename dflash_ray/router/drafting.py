"""Who drafts for which sequence, and what each drafter must be sent. Sans-IO, a part of the scheduler.

The ladder of a step: the sequence's drafter, n-gram lookup, plain decoding. A drafter has one request in flight; what
its sequences want meanwhile goes with the next one. A draft that is late is skipped and its drafter keeps the sequence;
a drafter that was late several times in a row is left, and its sequences move to another one, which gets their context
features by replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dflash_ray.config import DflashRayConfig
from dflash_ray.pb import common_pb2, drafter_pb2
from dflash_ray.router.actions import Action, DropDrafter, Replay, RequestDrafts
from dflash_ray.router.context import MAX_WAITING_BYTES
from dflash_ray.router.sequence import RouterSequence

_FIRST_BACK_OFF_S = 0.5
_MAX_BACK_OFF_S = 10.0
_FULL_PAUSE_S = 1.0  # before a drafter that had no room is offered another sequence
_EAGER_ROWS = 128  # context rows that are worth a request of their own, without a draft
_ROWS_A_TIMEOUT = 64  # context rows for which a drafter gets its time once more
_MAX_CONTEXT_BYTES = 4 * 1024 * 1024  # of features in one request
_MAX_CONTEXT_TOKENS = 32 * 1024  # of one sequence in one request to a drafter that reads tokens


@dataclass(slots=True)
class _InFlight:
    """The one request that a drafter works on.

    Attributes:
        deadline: when the next miss is counted.
        is_late: a miss was counted.
        is_given_up: a sequence went on without waiting for its answer; no other one waits for it either.
    """

    request_id: int
    sequence_ids: frozenset[int]
    sent_at: float
    patience_s: float
    deadline: float
    is_late: bool = False
    is_given_up: bool = False


@dataclass(slots=True)
class DrafterState:
    """A connected drafter.

    Attributes:
        num_misses: times in a row that its time was over before it answered.
        aside_until: no sequence goes there before.
        closed: sequences that it need not keep, told with the next request.
    """

    drafter_id: str
    needs_features: bool
    max_draft_tokens: int
    num_misses: int = 0
    aside_until: float = 0.0
    back_off_s: float = _FIRST_BACK_OFF_S
    closed: list[int] = field(default_factory=list)
    in_flight: _InFlight | None = None


class Drafting:
    """Drafters and the drafts under way."""

    def __init__(self, config: DflashRayConfig) -> None:
        self._timeout_s = config.router.draft_timeout_ms / 1000
        self._max_misses = config.router.max_missed_drafts
        self._hang_s = config.drafter.step_timeout_s
        self._num_candidates = config.router.num_candidates
        self._max_context_bytes = min(_MAX_CONTEXT_BYTES, config.network.max_message_bytes // 2)
        self._drafters: dict[str, DrafterState] = {}
        self._next_request_id = 1
        self.num_dropped: Counter[str] = Counter()
        self.num_replays = 0

    def join(self, drafter: DrafterState) -> None:
        """A drafter said hello."""
        self._drafters[drafter.drafter_id] = drafter

    def lose(self, drafter_id: str, sequences: Collection[RouterSequence]) -> None:
        """A drafter's stream broke: its sequences look for another one, unless they seem to be what breaks drafters."""
        drafter = self._drafters.pop(drafter_id, None)
        if drafter is None:
            return
        at_work = drafter.in_flight.sequence_ids if drafter.in_flight is not None else frozenset()
        for sequence in sequences:
            if sequence.context.drafter_id == drafter_id:
                sequence.context.num_losses += sequence.sequence_id in at_work
                sequence.leave_drafter()

    def close(self, sequence: RouterSequence) -> None:
        """The sequence is over; its drafter is told with the next request."""
        drafter = self._drafters.get(sequence.context.drafter_id or "")
        if drafter is not None:
            drafter.closed.append(sequence.sequence_id)

    def request(self, running: Sequence[RouterSequence], max_model_len: int, epoch: int, now: float) -> list[Action]:
        """What to ask of target and idle drafters, so that every sequence gets its draft."""
        actions: list[Action] = []
        for drafter, sequences in self._assigned(running, now):
            if drafter.needs_features:
                actions += self._replays(sequences)
            wanting = [s for s in sequences if s.wants_draft(max_model_len)]
            if drafter.in_flight is None:
                actions += self._next_request(drafter, sequences, wanting, max_model_len, epoch, now)
            elif not drafter.in_flight.is_given_up:
                for sequence in wanting:
                    if self._is_whole(drafter, sequence) and sequence.draft_deadline is None:
                        sequence.draft_deadline = now + self._timeout_s
        return actions

    def _assigned(
        self, running: Sequence[RouterSequence], now: float
    ) -> list[tuple[DrafterState, list[RouterSequence]]]:
        """All drafters with their sequences; sequences without one go to the least loaded that takes any."""
        if not self._drafters:
            return []
        by_drafter: dict[str, list[RouterSequence]] = {drafter_id: [] for drafter_id in self._drafters}
        lone = []
        for sequence in running:
            held_by = sequence.context.drafter_id
            if held_by is not None:
                by_drafter[held_by].append(sequence)
            elif sequence.draft_tokens and sequence.context.may_be_drafted_for:
                lone.append(sequence)
        free = [drafter_id for drafter_id, drafter in self._drafters.items() if drafter.aside_until <= now]
        for sequence in lone if free else ():
            sequence.context.drafter_id = min(free, key=lambda drafter_id: len(by_drafter[drafter_id]))
            by_drafter[sequence.context.drafter_id].append(sequence)
        return [(drafter, by_drafter[drafter_id]) for drafter_id, drafter in self._drafters.items()]

    def _replays(self, sequences: list[RouterSequence]) -> list[Action]:
        """Asks for rows that the target has computed and that did not find their way here."""
        actions: list[Action] = []
        for sequence in sequences:
            context = sequence.context
            is_behind = sequence.is_open and max(context.end, context.lacked_at) < sequence.num_computed
            if is_behind and not context.is_replaying and context.num_bytes < MAX_WAITING_BYTES // 2:
                context.is_replaying = True
                self.num_replays += 1
                actions.append(Replay(sequence.sequence_id, context.end))
        return actions

    def _is_whole(self, drafter: DrafterState, sequence: RouterSequence) -> bool:
        """Whether the next request can bring the drafter's context up to the anchor."""
        if not drafter.needs_features:
            return sequence.committed_len - sequence.context.sent_rows <= _MAX_CONTEXT_TOKENS
        context = sequence.context
        return context.end == sequence.committed_len - 1 and context.num_bytes <= self._max_context_bytes

    def _next_request(
        self,
        drafter: DrafterState,
        sequences: list[RouterSequence],
        wanting: list[RouterSequence],
        max_model_len: int,
        epoch: int,
        now: float,
    ) -> list[Action]:
        """Contexts and proposals for an idle drafter: those who wait for a draft first, then rows of long prompts."""
        request = drafter_pb2.DraftRequest(
            request_id=self._next_request_id, close=drafter.closed, num_candidates=self._num_candidates
        )
        room = self._max_context_bytes
        for sequence in wanting:
            room -= _add_context(request, drafter, sequence, room)
            if sequence.context.sent_rows == sequence.committed_len - 1:
                self._add_proposal(request, drafter, sequence, max_model_len, epoch)
                sequence.draft_deadline = sequence.draft_deadline or now + self._timeout_s
        for sequence in sequences:
            if drafter.needs_features and sequence.context.end - sequence.context.sent_rows >= _EAGER_ROWS:
                room -= _add_context(request, drafter, sequence, room)
        if not (request.close or request.contexts or request.sequence_ids):
            return []
        num_rows = sum(part.num_rows for part in request.contexts)
        patience_s = self._timeout_s * (1 + num_rows / _ROWS_A_TIMEOUT)
        involved = frozenset([*request.sequence_ids, *(part.sequence_id for part in request.contexts)])
        drafter.in_flight = _InFlight(request.request_id, involved, now, patience_s, now + patience_s)
        drafter.closed = []
        self._next_request_id += 1
        return [RequestDrafts(drafter.drafter_id, request)]

    def _add_proposal(
        self,
        request: drafter_pb2.DraftRequest,
        drafter: DrafterState,
        sequence: RouterSequence,
        max_model_len: int,
        epoch: int,
    ) -> None:
        request.sequence_ids.append(sequence.sequence_id)
        request.epochs.append(epoch)
        request.committed_lens.append(sequence.committed_len)
        request.anchor_token_ids.append(sequence.tokens[-1])
        request.temperatures.append(sequence.request.sampling.temperature)
        request.seeds.append(sequence.request.sampling.seed)
        request.wants_distributions.append(sequence.request.sampling.mode == common_pb2.VERIFY_MODE_REJECTION)
        request.num_draft_tokens.append(min(sequence.num_drafts(max_model_len), drafter.max_draft_tokens))

    def answer(
        self,
        drafter_id: str,
        reply: drafter_pb2.DraftReply,
        sequences: dict[int, RouterSequence],
        epoch: int | None,
        now: float,
    ) -> None:
        """Takes a drafter's drafts; those for another past are dropped."""
        drafter = self._drafters.get(drafter_id)
        if drafter is None or drafter.in_flight is None or drafter.in_flight.request_id != reply.request_id:
            return
        if not drafter.in_flight.is_late:
            drafter.num_misses = 0
            drafter.back_off_s = _FIRST_BACK_OFF_S
        drafter.in_flight = None
        for block in reply.blocks:
            sequence = sequences.get(block.sequence_id)
            if sequence is None or block.epoch != epoch or block.committed_len != sequence.committed_len:
                self.num_dropped["stale"] += 1
            elif sequence.draft_deadline is None:
                self.num_dropped["late"] += 1
            else:
                sequence.take_draft(block, "remote")
                sequence.draft_deadline = None
        for missing in reply.missing:
            sequence = sequences.get(missing.sequence_id)
            if sequence is None or sequence.context.drafter_id != drafter_id:
                continue
            sequence.miss_draft()
            if missing.is_refused:
                sequence.context.num_refusals += 1
                sequence.leave_drafter()
                drafter.aside_until = max(drafter.aside_until, now + _FULL_PAUSE_S)
                self.num_dropped["refused"] += 1
            else:
                sequence.context.restart(missing.have_len)

    def expire(self, sequences: Collection[RouterSequence], now: float) -> list[Action]:
        """Goes on without drafts that are late; leaves drafters that are late all the time or do not answer at all."""
        for sequence in sequences:
            if sequence.draft_deadline is not None and sequence.draft_deadline <= now:
                sequence.miss_draft()
                self.num_dropped["timeout"] += 1
                drafter = self._drafters.get(sequence.context.drafter_id or "")
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
                self._leave(drafter, sequences, now)
            if now - in_flight.sent_at >= self._hang_s:
                actions.append(DropDrafter(drafter.drafter_id))
        return actions

    def _leave(self, drafter: DrafterState, sequences: Collection[RouterSequence], now: float) -> None:
        """Puts a drafter aside; what it holds is closed there with the first request that it gets again."""
        drafter.num_misses = 0
        drafter.aside_until = now + drafter.back_off_s
        drafter.back_off_s = min(_MAX_BACK_OFF_S, 2 * drafter.back_off_s)
        for sequence in sequences:
            if sequence.context.drafter_id == drafter.drafter_id:
                drafter.closed.append(sequence.sequence_id)
                sequence.leave_drafter()

    def next_deadline(self) -> float | None:
        """When a drafter's time is over."""
        return min((d.in_flight.deadline for d in self._drafters.values() if d.in_flight is not None), default=None)


def _add_context(request: drafter_pb2.DraftRequest, drafter: DrafterState, sequence: RouterSequence, room: int) -> int:
    """Adds the next rows of a sequence's context, at most `room` bytes of features; returns the bytes added."""
    if drafter.needs_features:
        parts = sequence.context.give(room)
        request.contexts.extend(parts)
        return sum(len(part.data) for part in parts)
    start = sequence.context.sent_rows
    stop = min(sequence.committed_len - 1, start + _MAX_CONTEXT_TOKENS)
    if start < stop:
        tokens = sequence.tokens[start:stop]
        request.contexts.add(sequence_id=sequence.sequence_id, start=start, num_rows=stop - start, token_ids=tokens)
        sequence.context.sent_rows = stop
    return 0
