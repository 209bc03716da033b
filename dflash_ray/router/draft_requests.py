"""The requests that a drafter gets, and what is known of it between them. Sans-IO, a part of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dflash_ray.pb import common_pb2, drafter_pb2
from dflash_ray.router.sequence import RouterSequence

FIRST_BACK_OFF_S = 0.5
_MAX_CONTEXT_TOKENS = 32 * 1024  # of one sequence in one request to a drafter that reads tokens

Sequences = dict[int, RouterSequence]


@dataclass(slots=True)
class InFlight:
    """The one request that a drafter works on.

    Attributes:
        committed_lens: of the sequences with a proposal.
        deadline: when the next miss is counted.
        is_late: a miss was counted.
        is_given_up: a sequence went on without waiting for its answer; no other one waits for it either.
    """

    request_id: int
    committed_lens: dict[int, int]
    opened: frozenset[int]
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
        sequences: those that it serves.
        to_open: those whose rows it must be told to fetch.
        wanting: those that may want a draft and have not asked for it.
        closed: sequences that it need not keep, told with the next request.
    """

    drafter_id: str
    needs_features: bool
    max_draft_tokens: int
    num_misses: int = 0
    aside_until: float = 0.0
    back_off_s: float = FIRST_BACK_OFF_S
    sequences: Sequences = field(default_factory=dict)
    to_open: Sequences = field(default_factory=dict)
    wanting: Sequences = field(default_factory=dict)
    closed: list[int] = field(default_factory=list)
    in_flight: InFlight | None = None

    def forget(self, sequence_id: int) -> None:
        """It serves the sequence no more."""
        for sequences in (self.sequences, self.to_open, self.wanting):
            sequences.pop(sequence_id, None)


def add_opened(
    request: drafter_pb2.DraftRequest, sequences: Sequence[RouterSequence], address: str, step_id: int
) -> None:
    """Sequences whose rows are to be fetched from the group at `address`, which has them open once the step is done."""
    if sequences:
        request.source.address, request.source.step_id = address, step_id
        request.open.extend([sequence.sequence_id for sequence in sequences])
        request.open_lens.extend([sequence.committed_len - 1 for sequence in sequences])


def add_tokens(request: drafter_pb2.DraftRequest, sequence: RouterSequence) -> bool:
    """Adds the next tokens for a drafter that reads them; returns whether it has all of them then."""
    end = sequence.committed_len - 1
    start, stop = sequence.context.held_rows, min(end, sequence.context.held_rows + _MAX_CONTEXT_TOKENS)
    if start < stop:
        request.token_sequence_ids.append(sequence.sequence_id)
        request.token_starts.append(start)
        request.num_tokens.append(stop - start)
        request.token_ids.extend(sequence.tokens[start:stop])
        sequence.context.held_rows = stop
    return stop == end


def add_proposals(
    request: drafter_pb2.DraftRequest, sequences: Sequence[RouterSequence], max_model_len: int, max_draft_tokens: int
) -> None:
    """Sequences for which drafts are wanted."""
    sampling = [sequence.request.sampling for sequence in sequences]
    counts = [min(sequence.num_drafts(max_model_len), max_draft_tokens) for sequence in sequences]
    request.sequence_ids.extend([sequence.sequence_id for sequence in sequences])
    request.committed_lens.extend([sequence.committed_len for sequence in sequences])
    request.anchor_token_ids.extend([sequence.tokens[-1] for sequence in sequences])
    request.num_draft_tokens.extend(counts)
    request.temperatures.extend([one.temperature for one in sampling])
    request.seeds.extend([one.seed for one in sampling])
    request.wants_distributions.extend([one.mode == common_pb2.VERIFY_MODE_REJECTION for one in sampling])
