"""One ragged pass over the target: rows of prefill chunks and verify chains, one entry after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core.packing import pack_arrays, unpack_arrays

Ints = NDArray[np.int64]


def _none() -> Ints:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T rows in E entries. A row sees its sequence's context and the rows of its own entry up to itself.

    Attributes:
        token_ids, positions, slots: [T]; slot = page * page_size + offset, where the row's keys and values go.
        entry_lens: [E] rows of each entry.
        context_lens: [E] rows of the sequence that are in the cache before the entry.
        page_counts: [E] pages of each entry's table; pages: all tables, one after the other.
        sample_rows: rows whose logits are wanted, ascending.
        feature_rows: rows whose context features are wanted, ascending.
        scored_rows: [S] rows whose next token is known and is to have its log-probability, ascending.
        scored_tokens: [S] those tokens.
        num_top: [1] likeliest tokens wanted beside each of them; empty when none is scored.
    """

    token_ids: Ints
    positions: Ints
    slots: Ints
    entry_lens: Ints
    context_lens: Ints
    page_counts: Ints
    pages: Ints
    sample_rows: Ints
    feature_rows: Ints
    scored_rows: Ints = field(default_factory=_none)
    scored_tokens: Ints = field(default_factory=_none)
    num_top: Ints = field(default_factory=_none)

    def pack(self) -> Ints:
        """The batch as one flat array for a broadcast."""
        return pack_arrays([getattr(self, f.name) for f in fields(self)])

    @classmethod
    def unpack(cls, flat: Ints) -> StepBatch:
        return cls(*unpack_arrays(flat, [np.int64] * len(fields(cls))))
