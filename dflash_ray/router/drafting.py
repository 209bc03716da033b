"""Who drafts for which sequence, and what each drafter must be sent. Sans-IO, a part of the scheduler.

The ladder of a step: the sequence's drafter, another drafter, n-gram lookup, plain decoding. A drafter that is late or
gone costs its sequences one timeout; they move to another one, which gets their context features by replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from dflash_ray.pb import common_pb2, drafter_pb2
from dflash_ray.router.actions import Action, Replay, RequestDrafts
from dflash_ray.router.sequence import RouterSequence

_FIRST_BACK_OFF_S = 0.5
_MAX_BACK_OFF_S = 10.0


@dataclass(slots=True)
class DrafterState:
    """A connected drafter.

    Attributes:
        aside_until: no sequence goes there before, after it was late.
        closed: sequences that it need not keep, told with the next request.
    """

    drafter_id: str
    needs_features: bool
    max_draft_tokens: int
    aside_until: float = 0.0
    back_off_s: float = _FIRST_BACK_OFF_S
    closed: list[int] = field(default_factory=list)


class Drafting:
    """Drafters and the drafts under way."""

    def __init__(self, timeout_s: float, num_candidates: int) -> None:
        self._timeout_s = timeout_s
        self._num_candidates = num_candidates
        self._drafters: dict[str, DrafterState] = {}
        self._next_request_id = 1
        self.num_dropped: dict[str, int] = {}

    def join(self, drafter: DrafterState) -> None:
        """A drafter said hello."""
        self._drafters[drafter.drafter_id] = drafter

    def lose(self, drafter_id: str, sequences: Iterable[RouterSequence]) -> None:
        """A drafter's stream broke: its sequences look for another one."""
        if self._drafters.pop(drafter_id, None) is not None:
            self._abandon(drafter_id, sequences)

    def _abandon(self, drafter_id: str, sequences: Iterable[RouterSequence]) -> None:
        for sequence in sequences:
            if sequence.drafter_id == drafter_id:
                sequence.leave_drafter()

    def close(self, sequence: RouterSequence) -> None:
        """The sequence is over; its drafter is told with the next request."""
        drafter = self._drafters.get(sequence.drafter_id or "")
        if drafter is not None:
            drafter.closed.append(sequence.sequence_id)

    def request(self, sequences: list[RouterSequence], max_model_len: int, epoch: int, now: float) -> list[Action]:
        """Asks idle drafters for the drafts that `sequences`, all decoding, are without."""
        actions: list[Action] = []
        by_drafter: dict[str, list[RouterSequence]] = {}
        load = Counter(sequence.drafter_id for sequence in sequences)
        for sequence in sequences:
            is_served = sequence.draft is not None or sequence.draft_deadline is not None
            if is_served or not sequence.num_drafts(max_model_len):
                continue
            drafter = self._drafter_of(sequence, load, now)
            if drafter is None or sequence.is_replaying:
                continue
            if drafter.needs_features and not _is_contiguous(sequence):
                sequence.is_replaying = True
                actions.append(Replay(sequence.sequence_id, sequence.sent_rows))
                continue
            by_drafter.setdefault(drafter.drafter_id, []).append(sequence)
        for drafter_id, ready in by_drafter.items():
            actions.append(self._draft_request(self._drafters[drafter_id], ready, max_model_len, epoch, now))
        return actions

    def _drafter_of(self, sequence: RouterSequence, load: Counter[str | None], now: float) -> DrafterState | None:
        """The sequence's drafter, or the least loaded one that is not put aside."""
        current = self._drafters.get(sequence.drafter_id or "")
        if current is not None:
            return current
        free = [drafter_id for drafter_id, drafter in self._drafters.items() if drafter.aside_until <= now]
        if not free:
            sequence.pending.clear()  # nobody to send them to; a drafter that joins later gets a replay
            return None
        sequence.drafter_id = min(free, key=lambda drafter_id: load[drafter_id])
        load[sequence.drafter_id] += 1
        sequence.sent_rows = 0
        return self._drafters[sequence.drafter_id]

    def _draft_request(
        self, drafter: DrafterState, sequences: list[RouterSequence], max_model_len: int, epoch: int, now: float
    ) -> RequestDrafts:
        request = drafter_pb2.DraftRequest(
            request_id=self._next_request_id, close=drafter.closed, num_candidates=self._num_candidates
        )
        drafter.closed = []
        self._next_request_id += 1
        for sequence in sequences:
            request.contexts.extend(_contexts(sequence, drafter.needs_features))
            sequence.pending.clear()
            sequence.sent_rows = sequence.committed_len - 1
            sequence.draft_deadline = now + self._timeout_s
            request.sequence_ids.append(sequence.sequence_id)
            request.epochs.append(epoch)
            request.committed_lens.append(sequence.committed_len)
            request.anchor_token_ids.append(sequence.tokens[-1])
            request.temperatures.append(sequence.request.sampling.temperature)
            request.seeds.append(sequence.request.sampling.seed)
            request.wants_distributions.append(sequence.request.sampling.mode == common_pb2.VERIFY_MODE_REJECTION)
            request.num_draft_tokens.append(min(sequence.num_drafts(max_model_len), drafter.max_draft_tokens))
        return RequestDrafts(drafter.drafter_id, request)

    def answer(
        self, drafter_id: str, reply: drafter_pb2.DraftReply, sequences: dict[int, RouterSequence], epoch: int
    ) -> None:
        """Takes a drafter's drafts; those for another past are dropped."""
        drafter = self._drafters.get(drafter_id)
        if drafter is None:
            return
        drafter.back_off_s = _FIRST_BACK_OFF_S
        drafter.aside_until = 0.0
        for block in reply.blocks:
            sequence = sequences.get(block.sequence_id)
            if sequence is None or block.epoch != epoch or block.committed_len != sequence.committed_len:
                self._count_dropped("stale")
            elif sequence.draft_deadline is None:
                self._count_dropped("late")
            else:
                sequence.take_draft(block, "remote")
                sequence.draft_deadline = None
        for missing in reply.missing:
            sequence = sequences.get(missing.sequence_id)
            if sequence is not None and sequence.drafter_id == drafter_id:
                # What was sent since is not contiguous with what the drafter holds.
                sequence.sent_rows = missing.have_len
                sequence.pending.clear()
                sequence.draft_deadline = None

    def replayed(self, sequence: RouterSequence, features: common_pb2.ContextFeatures) -> None:
        """Context features came again; they end where the next step's begin."""
        sequence.is_replaying = False
        sequence.pending = [features] if features.num_rows else []

    def expire(self, sequences: Iterable[RouterSequence], now: float) -> None:
        """Drafters that let a deadline pass are put aside, and their sequences move on."""
        late = {
            sequence.drafter_id
            for sequence in sequences
            if sequence.draft_deadline is not None and sequence.draft_deadline <= now
        }
        for drafter_id in late:
            drafter = self._drafters.get(drafter_id or "")
            if drafter is not None:
                drafter.aside_until = now + drafter.back_off_s
                drafter.back_off_s = min(_MAX_BACK_OFF_S, 2 * drafter.back_off_s)
                self._count_dropped("timeout")
                self._abandon(drafter.drafter_id, sequences)

    def _count_dropped(self, reason: str) -> None:
        self.num_dropped[reason] = self.num_dropped.get(reason, 0) + 1


def _is_contiguous(sequence: RouterSequence) -> bool:
    """Whether the pending features carry the drafter's context from what it has to the anchor."""
    at = sequence.sent_rows
    for features in sequence.pending:
        if features.start > at:
            return False
        at = max(at, features.start + features.num_rows)
    return at == sequence.committed_len - 1


def _contexts(sequence: RouterSequence, needs_features: bool) -> list[common_pb2.ContextFeatures]:
    if needs_features:
        return sequence.pending
    start, stop = sequence.sent_rows, sequence.committed_len - 1
    tokens = sequence.tokens[start:stop]
    return [
        common_pb2.ContextFeatures(
            sequence_id=sequence.sequence_id, start=start, num_rows=stop - start, token_ids=tokens
        )
    ]
