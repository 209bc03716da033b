"""What a step wants of its rows of logits, as the columns that the operators read.

Rows form a forest: the root of a sequence is its last committed token, the other rows are draft nodes. The token drawn
at a row stands one position after the row's own token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_ray.core.arrays import are_ones
from dflash_ray.kernels.columns import IntColumn, PlanTensors, RowColumn
from dflash_ray.kernels.trees import depths_of
from dflash_ray.sampling.table import RANGES, Need, SamplingTable

Ints = NDArray[np.int64]
_ROOT = np.array(-1)


def _no_ids() -> Ints:
    return np.zeros(0, dtype=np.int64)


def _no_probs() -> NDArray[np.float32]:
    return np.zeros(0, dtype=np.float32)


@dataclass(slots=True)
class DrawRows:
    """The rows of S sequences from which tokens are drawn, R in all, one sequence after the other.

    Attributes:
        slots: [S] of the sequences.
        num_rows: [S] the root and its drafts.
        positions: [S] of the roots' tokens.
        token_ids: [R].
        parents: [R] row of the parent among the sequence's rows, -1 for roots; None where all drafts are chains.
        feature_rows: [S] row of each root in the step's context features, -1 when it has none.
        num_candidates: [S] candidates of each draft of a chain that was drawn, in rejection mode; 0 when none was.
        candidate_ids, candidate_probs: of all such drafts, the draft's own token first, and the probabilities that it
            was drawn with.
    """

    slots: Ints
    num_rows: Ints
    positions: Ints
    token_ids: Ints
    feature_rows: Ints
    parents: Ints | None = None
    num_candidates: Ints = field(default_factory=_no_ids)
    candidate_ids: Ints = field(default_factory=_no_ids)
    candidate_probs: NDArray[np.float32] = field(default_factory=_no_probs)


@dataclass(frozen=True, slots=True)
class PlanColumns:
    """A step's tensors, and what is to be known of them without asking the device.

    Attributes:
        draft_ids, draft_probs: [R, K] in rejection mode, else [0, 0]: candidates of each row's child, the child's own
            token first, and the probabilities that it was drawn with; -1 and 0 for none. A child that was not drawn is
            its only candidate, with probability 1.
        depth: rows on the longest path.
        needs: bits of `Need`, of any of the sequences.
        first_rows: [S] row of each sequence's root.
        num_logprobs: [S] likeliest tokens wanted beside each token, NO_LOGPROBS for none.
    """

    tensors: PlanTensors
    draft_ids: torch.Tensor
    draft_probs: torch.Tensor
    depth: int
    needs: int
    first_rows: Ints
    num_logprobs: Ints

    @property
    def has_thresholds(self) -> bool:
        return bool(self.needs & (Need.MIN_P | Need.TOP_K | Need.TOP_P))


def columns_of(rows: DrawRows, table: SamplingTable, device: torch.device) -> PlanColumns:
    """The columns of a step on the device of the logits. On the CPU the table's own memory is read."""
    table.settle()
    num_sequences, num_rows = len(rows.slots), len(rows.token_ids)
    first_rows = rows.num_rows.cumsum() - rows.num_rows
    sequence_of, offsets, parents = first_rows, np.zeros(num_rows, dtype=np.int64), _ROOT
    depths = offsets
    if not are_ones(rows.num_rows, num_rows):
        sequence_of = np.arange(num_sequences).repeat(rows.num_rows)
        offsets = np.arange(num_rows) - first_rows[sequence_of]
        parents = offsets - 1 if rows.parents is None else rows.parents
        depths = offsets if rows.parents is None else depths_of(parents, first_rows[sequence_of])
        parents = np.where(parents < 0, _ROOT, parents + first_rows[sequence_of])
    lines = np.empty((num_rows, len(RowColumn)), dtype=np.int64)
    lines[:, RowColumn.SEQUENCE] = sequence_of
    lines[:, RowColumn.POSITION] = rows.positions[sequence_of] + depths + 1
    lines[:, RowColumn.TOKEN] = rows.token_ids
    lines[:, RowColumn.PARENT] = parents
    ints = table.ints[rows.slots]
    ints[:, IntColumn.FIRST_ROW], ints[:, IntColumn.NUM_ROWS] = first_rows, rows.num_rows
    ints[:, IntColumn.ROOT_POSITION], ints[:, IntColumn.FEATURE_ROW] = rows.positions, rows.feature_rows
    needs = int(np.bitwise_or.reduce(table.needs[rows.slots], initial=0))
    ids, values = table.ids.reshape(-1), table.values.reshape(-1)
    if device.type != "cpu":
        ids, values = without_gaps(ints, ids, values)
    draft_ids, draft_probs = _no_ids().reshape(0, 0), _no_probs().reshape(0, 0)
    if needs & Need.REJECTION:
        draft_ids, draft_probs = _drafts(rows, lines, offsets, sequence_of)

    def move(array: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)

    return PlanColumns(
        tensors=PlanTensors(move(lines), move(ints), move(table.floats[rows.slots]), move(ids), move(values)),
        draft_ids=move(draft_ids),
        draft_probs=move(draft_probs),
        depth=1 + int(depths.max(initial=0)),
        needs=needs,
        first_rows=first_rows,
        num_logprobs=table.num_logprobs[rows.slots],
    )


def _drafts(
    rows: DrawRows, lines: Ints, offsets: Ints, sequence_of: Ints
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """draft_ids and draft_probs [R, K]."""
    # A chain: the child of row i is row i + 1, whose candidates are the i-th.
    has_drawn = len(rows.num_candidates) > 0
    counts = np.zeros(0, dtype=np.int64)
    if has_drawn:
        counts = np.where(offsets < rows.num_rows[sequence_of] - 1, rows.num_candidates[sequence_of], 0)
    width = max(1, int(counts.max(initial=0)))
    ids = np.full((len(lines), width), -1, dtype=np.int64)
    probs = np.zeros((len(lines), width), dtype=np.float32)
    nodes = np.flatnonzero(lines[:, RowColumn.PARENT] >= 0)[::-1]  # backwards: the first child of a row is written last
    ids[lines[nodes, RowColumn.PARENT], 0] = lines[nodes, RowColumn.TOKEN]
    probs[:, 0] = 1
    if has_drawn:
        is_given = np.arange(width) < counts[:, None]
        ids[is_given], probs[is_given] = rows.candidate_ids, rows.candidate_probs
    return ids, probs


def without_gaps(ints: Ints, ids: Ints, values: NDArray[np.float32]) -> tuple[Ints, NDArray[np.float32]]:
    """The ranges of `ids` and `values` that `ints` names, one after the other, which `ints` names then."""
    places = np.array(RANGES)
    begins, lens = ints[:, places].reshape(-1), ints[:, places + 1].reshape(-1)
    moved = np.cumsum(lens) - lens
    index = np.repeat(begins - moved, lens) + np.arange(lens.sum())
    ints[:, places] = moved.reshape(len(ints), -1)
    return ids[index], values[index]
