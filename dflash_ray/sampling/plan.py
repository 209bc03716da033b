"""What one step wants of its rows of logits, as columns that travel to every rank.

Rows form a forest: the root of a sequence is its last committed token, the other rows are draft nodes.
The token drawn at a row stands one position after the row's own token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core.packing import pack_arrays, unpack_arrays
from dflash_ray.kernels.columns import Mode

COUPLED, REJECTION = int(Mode.COUPLED), int(Mode.REJECTION)
NO_LOGPROBS = -1
NO_LIMIT = 1 << 40


@dataclass(slots=True)
class SequencePlan:
    """One sequence's part of a plan.

    Attributes:
        seed, position: key of the draws; position of the root row's token.
        tokens, parents: of the rows, root first; a parent is an index into the rows, -1 for the root.
        bias_ids, bias_values: added to logits.
        banned_ids, ban_below: tokens that may not be drawn for positions below ban_below.
        history_ids, history_counts: tokens seen so far, and how often in the output; the root's token is included.
        num_candidates: candidates of each draft of a chain that was drawn, in rejection mode; 0 when none was.
        candidate_ids, candidate_probs: [rows but the root, num_candidates], the draft's token first, and the
            probabilities that it was drawn with.
        stop_ids: tokens that end a sequence of more than min_len tokens; max_len: length at which it ends.
        feature_row: row of the root in the step's context features, -1 when it has none.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    mode: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    num_logprobs: int
    position: int
    tokens: list[int]
    parents: list[int]
    bias_ids: list[int] = field(default_factory=list)
    bias_values: list[float] = field(default_factory=list)
    banned_ids: list[int] = field(default_factory=list)
    ban_below: int = 0
    history_ids: list[int] = field(default_factory=list)
    history_counts: list[int] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    min_len: int = 0
    max_len: int = NO_LIMIT
    feature_row: int = -1
    num_candidates: int = 0
    candidate_ids: list[int] = field(default_factory=list)
    candidate_probs: list[float] = field(default_factory=list)

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    def depths(self) -> list[int]:
        """Distance of every row from the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths


_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_FLOAT_ARRAYS = ("bias_values", "candidate_probs")
_ARRAYS = (
    "tokens", "parents", "bias_ids", "banned_ids", "history_ids", "history_counts", "stop_ids", "candidate_ids",
    *_FLOAT_ARRAYS,
)  # fmt: skip
_INTS = tuple(f.name for f in fields(SequencePlan) if f.name not in (*_FLOATS, *_ARRAYS))


def pack_plan(plan: Sequence[SequencePlan]) -> NDArray[np.int64]:
    """The plan as one flat array for a broadcast."""
    columns: list[NDArray[Any]] = []
    for sequence in plan:
        ints = [getattr(sequence, name) for name in _INTS]
        # A seed may use all 64 bits; the array is signed.
        columns.append(np.array([value - (1 << 64) if value >> 63 > 0 else value for value in ints], dtype=np.int64))
        columns.append(np.array([getattr(sequence, name) for name in _FLOATS], dtype=np.float64))
        for name in _ARRAYS:
            columns.append(np.asarray(getattr(sequence, name), dtype=_dtype(name)))
    return pack_arrays(columns)


def _dtype(name: str) -> Any:
    return np.float64 if name in _FLOAT_ARRAYS else np.int64


def unpack_plan(flat: NDArray[np.int64]) -> list[SequencePlan]:
    """The plan of `pack_plan`."""
    dtypes = [np.int64, np.float64, *(_dtype(name) for name in _ARRAYS)]
    count = int(flat[0]) // len(dtypes)
    arrays = unpack_arrays(flat, dtypes * count)
    plan = []
    for start in range(0, len(arrays), len(dtypes)):
        ints, floats, *rest = arrays[start : start + len(dtypes)]
        values: dict[str, Any] = dict(zip(_INTS, (int(value) for value in ints), strict=True))
        values["seed"] &= (1 << 64) - 1
        values.update(zip(_FLOATS, (float(value) for value in floats), strict=True))
        values.update(zip(_ARRAYS, (array.tolist() for array in rest), strict=True))
        plan.append(SequencePlan(**values))
    return plan
