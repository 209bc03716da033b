"""What a pass leaves behind: accepted tokens are committed, the rest is rolled back by not being counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.sampling.verify import Verdict
from dflash_ray.target_group.batch import Rows
from dflash_ray.target_group.slots import SlotTable
from dflash_ray.target_group.step import Ids, Ints, StepFeatures, no_ints


@dataclass(frozen=True, slots=True)
class Commit:
    """What became of the E entries of a pass.

    Attributes:
        is_flagged: [E] the logits were not finite, and the sequence is as it was.
        num_kept: [E] rows that stay in the cache, from the entry's first on.
        num_accepted, num_tokens, finishes: [E]; 0 for entries that draw no token.
        token_ids: committed, one entry after the other.
    """

    is_flagged: NDArray[np.bool_]
    num_kept: Ints
    num_accepted: Ints
    num_tokens: Ints
    finishes: Ints
    token_ids: Ints


def commit(table: SlotTable, rows: Rows, verdict: Verdict | None) -> Commit:
    """Takes a verdict over the entries that draw into the table."""
    count = len(rows.slots)
    is_flagged = np.zeros(count, dtype=np.bool_)
    num_kept = rows.counts.copy()
    num_accepted, num_tokens, finishes = (np.zeros(count, dtype=np.int64) for _ in range(3))
    token_ids = no_ints()
    if verdict is not None:
        draws = rows.draws
        is_flagged[draws] = verdict.is_flagged
        kept = np.where(verdict.is_flagged, 0, verdict.num_tokens)
        num_tokens[draws] = kept
        num_accepted[draws] = np.minimum(verdict.num_accepted, kept)
        finishes[draws] = np.where(verdict.is_flagged, 0, verdict.finishes)
        num_kept[draws] = np.where(verdict.is_flagged, 0, verdict.kv_lens - rows.starts[draws])
        token_ids = verdict.tokens[np.arange(verdict.tokens.shape[1]) < kept[:, None]]
        table.commit(rows.slots[draws], kept, token_ids)
    table.kv_lens[rows.slots] += num_kept
    return Commit(is_flagged, num_kept, num_accepted, num_tokens, finishes, token_ids)


def kept_features(table: SlotTable, rows: Rows, done: Commit, sequence_ids: Ids, features: Tensor) -> StepFeatures:
    """Features [F, H] of a pass, and which of them it kept."""
    wanted = table.wants_features[rows.slots]
    starts, counts, num_rows = rows.starts[wanted], rows.counts[wanted], done.num_kept[wanted]
    slot_of = np.repeat(rows.slots[wanted], num_rows)
    positions = np.arange(len(slot_of)) + np.repeat(starts - np.cumsum(num_rows) + num_rows, num_rows)
    return StepFeatures(
        sequence_ids=sequence_ids[wanted],
        starts=starts,
        num_rows=num_rows,
        first_rows=np.cumsum(counts) - counts,
        rows=features,
        cache_rows=table.cache_rows(slot_of, positions),
    )
