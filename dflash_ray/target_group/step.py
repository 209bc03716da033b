"""A step's input and output, as plain arrays: what the engine takes and gives. The wire's form of both is `codec.py`'s.

Shapes: P prefill entries and V verify entries of a step, E = P + V in this order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.core.draft_blocks import BlockColumns
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.parameters import SamplingParams

Ints = NDArray[np.int64]
Ids = NDArray[np.uint64]  # of sequences
Floats = NDArray[np.float32]


# Empty columns are the same ones everywhere: nothing can be written to them.
_NO_IDS: Ids = np.zeros(0, dtype=np.uint64)
_NO_INTS: Ints = np.zeros(0, dtype=np.int64)
_NO_FLOATS: Floats = np.zeros(0, dtype=np.float32)


def no_ids() -> Ids:
    return _NO_IDS


def no_ints() -> Ints:
    return _NO_INTS


def no_floats() -> Floats:
    return _NO_FLOATS


class EntryStatus(IntEnum):
    """What became of an entry; the cases are described in target.proto, whose numbers these are."""

    OK = 1
    STALE = 2
    UNKNOWN = 3
    NO_PAGES = 4
    FAILED = 5
    ENDED = 6


@dataclass(frozen=True, slots=True)
class Opening:
    """A sequence that joins with all tokens known so far.

    Attributes:
        prompt_len: tokens before it count as prompt, for penalties and limits.
        min_new_tokens: stop tokens are banned before so many.
        cache_salt: only sequences with the same one share cached rows.
    """

    sequence_id: int
    token_ids: Ints
    prompt_len: int
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_ids: Ints = field(default_factory=no_ints)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    wants_features: bool = False
    cache_salt: bytes = b""


@dataclass(slots=True)
class Drafts:
    """Draft nodes of the verify entries, one entry after the other.

    Attributes:
        counts: [V].
        token_ids: [n] of all nodes.
        parents: [n] the parent's index in its entry: 0 is the anchor, k the k-th node. Empty where all entries are
            chains, as those of `chain_parents` are.
        num_candidates: [V] of each node that was drawn, in rejection mode, or empty when none was; 0 for entries whose
            nodes were not drawn.
        candidate_ids, candidate_probs: of all such nodes, the node's own token first, and the probabilities that it
            was drawn with.
    """

    counts: Ints = field(default_factory=no_ints)
    token_ids: Ints = field(default_factory=no_ints)
    parents: Ints = field(default_factory=no_ints)
    num_candidates: Ints = field(default_factory=no_ints)
    candidate_ids: Ints = field(default_factory=no_ints)
    candidate_probs: Floats = field(default_factory=no_floats)


def chain_parents(counts: Ints) -> Ints:
    """Parents of drafts that are chains of these lengths."""
    firsts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(firsts, counts)


@dataclass(slots=True)
class StepInput:
    """One pass over the target.

    Attributes:
        close, open: done before the pass, in this order.
        prefill_ids, prefill_lens: [P] the next so many tokens of these sequences.
        verify_ids, base_lens: [V] sequences and how many committed tokens their drafts follow; ahead, how many there
            were before the last ones.
        is_ahead: the step counts on what the one before it commits; see target.proto.
        own_counts: [V] drafts of the group's own drafter that each entry may verify, or empty when none does.
        least_own_log_prob: of such a draft and all that it follows; 0 for any.
        draft_ids, draft_counts: sequences for which the colocated drafter is to draft after the pass, and how many.
        num_candidates: of each slot of a colocated draft.
        tree_width: of colocated drafts; above 1 they are trees, in which so many follow the same one at most.
        faults_of_open, faults_of_drafts: what `step_check` found, by index in `open` and among the verify entries.
    """

    step_id: int = 0
    close: Ids = field(default_factory=no_ids)
    open: list[Opening] = field(default_factory=list)
    prefill_ids: Ids = field(default_factory=no_ids)
    prefill_lens: Ints = field(default_factory=no_ints)
    verify_ids: Ids = field(default_factory=no_ids)
    base_lens: Ints = field(default_factory=no_ints)
    is_ahead: bool = False
    own_counts: Ints = field(default_factory=no_ints)
    least_own_log_prob: float = 0.0
    drafts: Drafts = field(default_factory=Drafts)
    draft_ids: Ids = field(default_factory=no_ids)
    draft_counts: Ints = field(default_factory=no_ints)
    num_candidates: int = 1
    tree_width: int = 1
    faults_of_open: dict[int, str] = field(default_factory=dict)
    faults_of_drafts: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepFeatures:
    """Context features of the rows that a step kept, of S sequences.

    Attributes:
        sequence_ids, starts, num_rows: [S] positions start ... start + num_rows - 1 of the sequence.
        first_rows: [S] where its rows begin in `rows`.
        rows: [n, H], among them rows that were not kept; nothing writes to them later.
        cache_rows: rows of the cache at these positions, one sequence after the other.
    """

    sequence_ids: Ids
    starts: Ints
    num_rows: Ints
    first_rows: Ints
    rows: Tensor
    cache_rows: Ints


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of a prompt's tokens start, start + 1, ..."""

    sequence_id: int
    start: int
    logprobs: Logprobs


@dataclass(slots=True)
class StepOutput:
    """What a step leaves.

    Attributes:
        sequence_ids, statuses, committed_lens, num_accepted, num_tokens, finishes: [E]; see StepResult in target.proto.
        kv_lens, cached_lens: [P]; see StepResult as well.
        token_ids: committed, one entry after the other.
        errors: one text for each FAILED entry, in order.
        logprobs: one for each entry that asked and got tokens, in order.
        colocated_drafts: what was drafted after the pass.
        own_counts, own_log_probs, own_parents, accepted_drafts: see StepResult.
        forward_ns, verify_ns, draft_ns: of the pass with all that the host does before it, of the verdict, of what
            comes after it.
    """

    step_id: int
    sequence_ids: Ids
    statuses: Ints
    committed_lens: Ints
    num_accepted: Ints
    num_tokens: Ints
    token_ids: Ints
    finishes: Ints
    kv_lens: Ints
    cached_lens: Ints
    errors: list[str]
    logprobs: list[Logprobs]
    prompt_logprobs: list[PromptLogprobs]
    free_pages: int
    features: StepFeatures | None = None
    colocated_drafts: BlockColumns = field(default_factory=BlockColumns.none)
    own_counts: Ints = field(default_factory=no_ints)
    own_log_probs: Floats = field(default_factory=no_floats)
    own_parents: Ints = field(default_factory=no_ints)
    accepted_drafts: Ints = field(default_factory=no_ints)
    forward_ns: int = 0
    verify_ns: int = 0
    draft_ns: int = 0
