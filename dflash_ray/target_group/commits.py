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
    if verdict is None:
        nothing = np.zeros(len(rows.slots), dtype=np.int64)
        done = Commit(nothing > 0, rows.counts, nothing, nothing, nothing, no_ints())
    elif np.count_nonzero(rows.draws) == len(rows.slots):
        done = _take(table, rows.slots, rows.starts, verdict)
    else:
        draws, num_entries = rows.draws, len(rows.slots)
        drawn = _take(table, rows.slots[draws], rows.starts[draws], verdict)
        is_flagged, num_kept = np.zeros(num_entries, dtype=np.bool_), rows.counts.copy()
        is_flagged[draws], num_kept[draws] = drawn.is_flagged, drawn.num_kept
        columns = np.zeros((3, num_entries), dtype=np.int64)
        columns[:, draws] = drawn.num_accepted, drawn.num_tokens, drawn.finishes
        done = Commit(is_flagged, num_kept, *columns, drawn.token_ids)
    table.kv_lens[rows.slots] += done.num_kept
    return done


def _take(table: SlotTable, slots: Ints, starts: Ints, verdict: Verdict) -> Commit:
    """Commits what was drawn for these slots, whose roots are at `starts`; without the rows that are kept."""
    is_flagged, finishes, num_kept = verdict.is_flagged, verdict.finishes, verdict.kv_lens - starts
    kept = np.where(is_flagged, 0, verdict.num_tokens)  # not a part of the verdict: the counting operator takes it
    if np.count_nonzero(is_flagged):
        finishes, num_kept = np.where(is_flagged, 0, finishes), np.where(is_flagged, 0, num_kept)
    token_ids = verdict.tokens[np.arange(verdict.tokens.shape[1]) < kept[:, None]]
    table.commit(slots, kept, token_ids)
    table.is_over[slots] = finishes > 0
    return Commit(is_flagged, num_kept, np.minimum(verdict.num_accepted, kept), kept, finishes, token_ids)


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
    slot_of, positions = rows.slots[wanted].repeat(num_rows), spans(starts, num_rows)
    return StepFeatures(
        sequence_ids=sequence_ids[wanted],
        starts=starts,
        num_rows=num_rows,
        first_rows=counts.cumsum() - counts,
        rows=features,
        cache_rows=table.cache_rows(slot_of, positions),
    )


def to_host(features: StepFeatures) -> StepFeatures:
    """The kept rows alone, on the host: those of a device that were not kept need not come over."""
    index = torch.from_numpy(spans(features.first_rows, features.num_rows))
    rows = features.rows.index_select(0, index.to(features.rows.device)).cpu()
    return replace(features, first_rows=np.cumsum(features.num_rows) - features.num_rows, rows=rows)
