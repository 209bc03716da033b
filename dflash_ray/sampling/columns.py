"""From a step's plan to the columns that the operators read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_ray.kernels.columns import FloatColumn, IntColumn, Mode, PlanTensors
from dflash_ray.sampling.plan import SequencePlan

_COLDEST = 1e-5  # below this temperature the law is the argmax in all but name, and 1/T would overflow


@dataclass(frozen=True, slots=True)
class PlanColumns:
    """A plan's tensors and what it needs, known without asking the device.

    Attributes:
        draft_ids, draft_probs: [R, K] in rejection mode, else [0, 0]: candidates of each row's child, the child's own
            token first, and the probabilities that it was drawn with; -1 and 0 for none. A child that was not drawn is
            its only candidate, with probability 1.
        depth: rows on the longest path.
    """

    tensors: PlanTensors
    draft_ids: torch.Tensor
    draft_probs: torch.Tensor
    depth: int
    is_greedy: bool
    is_rejection: bool
    has_adjustments: bool
    has_min_p: bool
    has_top_k: bool
    has_top_p: bool

    @property
    def has_thresholds(self) -> bool:
        return self.has_min_p or self.has_top_k or self.has_top_p


def to_columns(plan: Sequence[SequencePlan], device: torch.device) -> PlanColumns:
    """Columns of a plan on the device of the logits."""
    rows: list[tuple[int, int, int, int]] = []
    children: list[int] = []
    ints = np.zeros((len(plan), len(IntColumn)), dtype=np.int64)
    floats = np.zeros((len(plan), len(FloatColumn)), dtype=np.float32)
    ids: list[int] = []
    values: list[float] = []
    depth = 1
    for index, sequence in enumerate(plan):
        first = len(rows)
        depths = sequence.depths()
        depth = max(depth, 1 + max(depths))
        for token, parent, below in zip(sequence.tokens, sequence.parents, depths, strict=True):
            at = parent if parent < 0 else first + parent
            rows.append((index, sequence.position + below + 1, token, at))
            children.append(-1)
            if at >= 0 and children[at] < 0:
                children[at] = token
        ranges = (
            sorted(zip(sequence.history_ids, sequence.history_counts, strict=True)),
            zip(sequence.bias_ids, sequence.bias_values, strict=True),
            ((token, 0.0) for token in sequence.banned_ids),
            ((token, 0.0) for token in sequence.stop_ids),
        )
        bounds = []
        for pairs in ranges:
            begin = len(ids)
            for token, value in pairs:
                ids.append(token)
                values.append(value)
            bounds += [begin, len(ids) - begin]
        seed = sequence.seed - (1 << 64) if sequence.seed >> 63 else sequence.seed
        ints[index] = (
            seed, sequence.mode, sequence.top_k, first, len(sequence.tokens), sequence.position, sequence.ban_below,
            sequence.min_len, sequence.max_len, sequence.feature_row, *bounds,
        )  # fmt: skip
        floats[index] = (
            1.0 / sequence.temperature if sequence.temperature >= _COLDEST else 0.0,
            sequence.top_p,
            math.log(sequence.min_p) if sequence.min_p > 0 else -math.inf,
            sequence.presence_penalty, sequence.frequency_penalty, sequence.repetition_penalty,
        )  # fmt: skip
    drawn = [sequence for sequence in plan if sequence.temperature >= _COLDEST]
    is_rejection = any(sequence.mode == Mode.REJECTION for sequence in drawn)
    draft_ids, draft_probs = _drafts(plan, children) if is_rejection else (np.zeros((0, 0)), np.zeros((0, 0)))

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return PlanColumns(
        tensors=PlanTensors(
            move(np.array(rows, dtype=np.int64).reshape(-1, 4)),
            move(ints),
            move(floats),
            move(np.array(ids, dtype=np.int64)),
            move(np.array(values, dtype=np.float32)),
        ),
        draft_ids=move(draft_ids.astype(np.int64)),
        draft_probs=move(draft_probs.astype(np.float32)),
        depth=depth,
        is_greedy=not drawn,
        is_rejection=is_rejection,
        has_adjustments=any(s.has_penalties or s.bias_ids or s.banned_ids for s in plan),
        has_min_p=any(sequence.min_p > 0 for sequence in drawn),
        has_top_k=any(sequence.top_k > 0 for sequence in drawn),
        has_top_p=any(sequence.top_p < 1 for sequence in drawn),
    )


def _drafts(plan: Sequence[SequencePlan], children: list[int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """draft_ids and draft_probs [R, K] of rows whose first children are `children`."""
    width = max(1, *(sequence.num_candidates for sequence in plan))
    ids, probs = np.full((len(children), width), -1), np.zeros((len(children), width))
    ids[:, 0], probs[:, 0] = children, 1
    first = 0
    for sequence in plan:
        count = sequence.num_candidates
        if count:
            # A chain: the child of row i is row i + 1, whose candidates are the i-th.
            chain = slice(first, first + sequence.num_rows - 1)
            ids[chain, :count] = np.reshape(sequence.candidate_ids, (-1, count))
            probs[chain, :count] = np.reshape(sequence.candidate_probs, (-1, count))
        first += sequence.num_rows
    return ids, probs
