"""What a pass leaves behind: accepted tokens are committed, the rest is rolled back by not being counted.

An accepted path of a tree lies among rows that are not kept: its rows move to where they would lie in a chain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.core.arrays import spans
from dflash_ray.sampling.verify import Verdict
from dflash_ray.target_group.batch import Rows
from dflash_ray.target_group.slots import SlotTable
from dflash_ray.target_group.step import Ids, Ints, StepFeatures, no_ints


@dataclass(frozen=True, slots=True)
class Commit:
    """What became of the E entries of a pass.

    Attributes:
        is_flagged: [E] the logits were not finite, and the sequence is as it was.
        num_kept: [E] rows that stay in the cache: the entry's first, and those of the accepted drafts.
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
        table.is_over[rows.slots[draws]] = finishes[draws] > 0
    table.kv_lens[rows.slots] += num_kept
    return Commit(is_flagged, num_kept, num_accepted, num_tokens, finishes, token_ids)


def rows_to_move(table: SlotTable, rows: Rows, verdict: Verdict) -> tuple[Ints, Ints]:
    """Rows [n] of the cache with keys and values of accepted drafts that lie elsewhere than their positions, and where

    these are; in an order in which no row is overwritten before it was moved.
    """
    slots, starts = rows.slots[rows.draws], rows.starts[rows.draws]
    in_place = np.arange(1, verdict.accepted_rows.shape[1] + 1)
    is_away = (in_place <= verdict.num_accepted[:, None]) & (verdict.accepted_rows != in_place)
    is_away[verdict.is_flagged] = False
    entries, columns = np.nonzero(is_away)
    slots, starts = slots[entries], starts[entries]
    source = table.cache_rows(slots, starts + verdict.accepted_rows[entries, columns])
    return source, table.cache_rows(slots, starts + in_place[columns])


def accepted_drafts(rows: Rows, verdict: Verdict, done: Commit) -> Ints:
    """Places of accepted drafts in their entries, the anchor's being 0, of the verify entries one after the other."""
    accepted: Ints = verdict.accepted_rows[rows.is_verify[rows.draws]]
    return accepted[np.arange(accepted.shape[1]) < done.num_accepted[rows.is_verify][:, None]]


def kept_features(table: SlotTable, rows: Rows, done: Commit, sequence_ids: Ids, features: Tensor) -> StepFeatures:
    """Features [F, H] of a pass, and which of them it kept; those of an accepted path lie behind its root's."""
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


def to_host(features: StepFeatures) -> StepFeatures:
    """The kept rows alone, on the host: those of a device that were not kept need not come over."""
    index = torch.from_numpy(spans(features.first_rows, features.num_rows))
    rows = features.rows.index_select(0, index.to(features.rows.device)).cpu()
    return replace(features, first_rows=np.cumsum(features.num_rows) - features.num_rows, rows=rows)
