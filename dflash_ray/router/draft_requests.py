"""The requests that a drafter gets, and what is known of it between them. Sans-IO, a part of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dflash_ray.core.arrays import Ints, spans
from dflash_ray.pb import drafter_pb2
from dflash_ray.router.sequence import RouterSequence
from dflash_ray.router.slot_table import SlotTable

FIRST_BACK_OFF_S = 0.5
_MAX_CONTEXT_TOKENS = 32 * 1024  # of one sequence in one request to a drafter that reads tokens

Sequences = dict[int, RouterSequence]


@dataclass(slots=True)
class InFlight:
    """The one request that a drafter works on.

    Attributes:
        slots, ids, committed_lens: of the sequences with a proposal, by rising id; a slot may be another's by now.
        deadline: when the next miss is counted.
        is_late: a miss was counted.
        is_given_up: a sequence went on without waiting for its answer; no other one waits for it either.
    """

    request_id: int
    slots: Ints
    ids: Ints
    committed_lens: Ints
    opened: frozenset[int]
    sent_at: float
    patience_s: float
    deadline: float
    is_late: bool = False
    is_given_up: bool = False

    def places(self, ids: Ints) -> Ints:
        """Where these sequences are in `ids`; anywhere for those that aren't."""
        return np.minimum(np.searchsorted(self.ids, ids), max(0, len(self.ids) - 1))

    def asked_at(self, sequence_id: int) -> int | None:
        """The length for which a draft of the sequence was asked."""
        place = int(np.searchsorted(self.ids, sequence_id))
        is_there = place < len(self.ids) and self.ids[place] == sequence_id
        return int(self.committed_lens[place]) if is_there else None


@dataclass(slots=True)
class DrafterState:
    """A connected drafter.

    Attributes:
        number: its own for good, by which slots name their drafter.
        num_misses: times in a row that its time was over before it answered.
        aside_until: no sequence goes there before.
        sequences: those that it serves.
        to_open: those whose rows it must be told to fetch.
        closed: sequences that it need not keep, told with the next request.
    """

    drafter_id: str
    needs_features: bool
    max_draft_tokens: int
    number: int = 0
    num_misses: int = 0
    aside_until: float = 0.0
    back_off_s: float = FIRST_BACK_OFF_S
    sequences: Sequences = field(default_factory=dict)
    to_open: Sequences = field(default_factory=dict)
    closed: list[int] = field(default_factory=list)
    in_flight: InFlight | None = None

    def forget(self, sequence_id: int) -> None:
        """It serves the sequence no more."""
        self.sequences.pop(sequence_id, None)
        self.to_open.pop(sequence_id, None)


def add_opened(
    request: drafter_pb2.DraftRequest, sequences: Sequence[RouterSequence], address: str, step_id: int
) -> None:
    """Sequences whose rows are to be fetched from the group at `address`; they are open once the step is done."""
    if sequences:
        request.source.address, request.source.step_id = address, step_id
        request.open.extend([sequence.sequence_id for sequence in sequences])
        request.open_lens.extend([sequence.committed_len - 1 for sequence in sequences])


def add_tokens(request: drafter_pb2.DraftRequest, table: SlotTable, slots: Ints) -> Ints:
    """Adds the next tokens for a drafter that reads them; returns the slots of which it has all then."""
    starts = table.held_rows[slots]
    ends = table.committed_lens[slots] - 1
    counts = np.minimum(ends - starts, _MAX_CONTEXT_TOKENS)
    has_new = counts > 0
    slots_with_new, starts, counts = slots[has_new], starts[has_new], counts[has_new]
    request.token_sequence_ids.extend(table.ids[slots_with_new].tolist())
    request.token_starts.extend(starts.tolist())
    request.num_tokens.extend(counts.tolist())
    token_ids = table.tokens.reshape(-1)[spans(slots_with_new * table.max_len + starts, counts)]
    request.token_ids.extend(token_ids.tolist())
    table.held_rows[slots_with_new] = starts + counts
    whole: Ints = slots[table.held_rows[slots] == ends]
    return whole


def add_proposals(request: drafter_pb2.DraftRequest, table: SlotTable, slots: Ints, counts: Ints) -> None:
    """Sequences for which counts[i] drafts are wanted."""
    request.sequence_ids.extend(table.ids[slots].tolist())
    request.committed_lens.extend(table.committed_lens[slots].tolist())
    request.anchor_token_ids.extend(table.anchors(slots).tolist())
    request.num_draft_tokens.extend(counts.tolist())
    request.temperatures.extend(table.temperatures[slots].tolist())
    request.seeds.extend(table.seeds[slots].tolist())
    wants_distributions = table.wants_distributions[slots]
    if np.count_nonzero(wants_distributions):
        request.wants_distributions.extend(wants_distributions.tolist())
