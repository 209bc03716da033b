"""One ragged pass over the target: rows of prompts' chunks and anchors with their drafts, gathered from the slots."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core import host_code
from dflash_ray.core.arrays import are_ones, spans
from dflash_ray.kernels.trees import depths_of
from dflash_ray.sampling.columns import DrawRows
from dflash_ray.target_group.slots import SlotTable
from dflash_ray.target_group.step import Drafts, Ints, chain_parents, no_ints


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T rows in E entries. A row sees its sequence's context and those rows of its own entry that it follows.

    Attributes:
        token_ids, positions, slots: [T]; slot = page * page_size + offset, where the row's keys and values go. Rows of
            a tree may have one position, and have a slot each.
        entry_lens: [E] rows of each entry.
        context_lens: [E] rows of the sequence that are in the cache before the entry.
        page_counts: [E] pages of each entry's table; pages: all tables, one after the other.
        sample_rows: rows whose logits are wanted, ascending.
        feature_rows: rows whose context features are wanted, ascending.
        scored_rows: [S] rows whose next token is known and is to have its log-probability, ascending.
        scored_tokens: [S] those tokens.
        num_top: [1] likeliest tokens wanted beside each of them; empty when none is scored.
        parents: [T] row of its entry that each row follows, -1 for an entry's first; empty where all follow the one
            before them.
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
    scored_rows: Ints = field(default_factory=no_ints)
    scored_tokens: Ints = field(default_factory=no_ints)
    num_top: Ints = field(default_factory=no_ints)
    parents: Ints = field(default_factory=no_ints)


@dataclass(frozen=True, slots=True)
class Rows:
    """The entries of a pass, E of them: all that run.

    Attributes:
        slots, starts, counts: [E] of the sequence, its first row's position, rows.
        is_verify: [E]; the rows are an anchor and its drafts.
        draws: [E] a token follows: of verify entries, and of the chunk that ends a prompt.
        num_scored: [E] rows, from the first on, whose next tokens are to have log-probabilities.
    """

    slots: Ints
    starts: Ints
    counts: Ints
    is_verify: NDArray[np.bool_]
    draws: NDArray[np.bool_]
    num_scored: Ints


def build_batch(table: SlotTable, rows: Rows, drafts: Drafts) -> tuple[StepBatch, DrawRows]:
    """The pass over E entries, and its rows that draw. `drafts` are those of the verify entries among them."""
    slots, starts, counts = rows.slots, rows.starts, rows.counts
    token_ids, positions, cache_rows = gather_rows(table, rows, drafts.token_ids)
    parents = _parents(rows, drafts)
    if len(parents):
        positions = np.repeat(starts, counts) + depths_of(parents, np.repeat(np.cumsum(counts) - counts, counts))
    page_counts = table.page_counts[slots]
    wants_features = table.wants_features[slots]
    roots = np.where(rows.is_verify, 0, counts - 1)  # of an entry's rows that draw, the first
    if np.count_nonzero(roots):
        entry_of, offsets = _entries_and_offsets(counts)
        sample_rows = np.flatnonzero(rows.draws[entry_of] & (offsets >= roots[entry_of]))
    else:
        sample_rows = _rows_of(rows.draws, counts)
    num_features = np.where(wants_features, counts, 0)
    first_features = num_features.cumsum() - num_features
    batch = StepBatch(
        token_ids=token_ids,
        positions=positions,
        slots=cache_rows,
        entry_lens=counts,
        context_lens=starts,
        page_counts=page_counts,
        pages=page_tables(table, slots, page_counts),
        sample_rows=sample_rows,
        feature_rows=_rows_of(wants_features, counts),
        **_scored(table, rows, positions),
        parents=parents,
    )
    draws = slice(None) if np.count_nonzero(rows.draws) == len(slots) else rows.draws
    drawing = DrawRows(
        slots=slots[draws],
        num_rows=(counts - roots)[draws],
        positions=(starts + roots)[draws],
        token_ids=token_ids[sample_rows],
        feature_rows=np.where(wants_features, first_features + roots, -1)[draws],
    )
    if len(parents):
        drawing.parents = np.where(_is_draft(rows), parents, -1)[sample_rows]
    if len(drafts.num_candidates):
        drawing.num_candidates = np.zeros(len(slots), dtype=np.int64)
        drawing.num_candidates[rows.is_verify] = drafts.num_candidates
        drawing.num_candidates = drawing.num_candidates[draws]
        drawing.candidate_ids, drawing.candidate_probs = drafts.candidate_ids, drafts.candidate_probs
    return batch, drawing


def gather_rows(table: SlotTable, rows: Rows, draft_ids: Ints) -> tuple[Ints, Ints, Ints]:
    """Of all rows, [T] each: token ids, places among the sequence's rows in the cache, and rows of the cache.

    The rows of an entry that verifies are its anchor and, one entry's after the other's, `draft_ids`.
    """
    num_rows, compiled = int(rows.counts.sum()), host_code.library()
    if are_ones(rows.counts, num_rows):
        token_ids = table.tokens[rows.slots, rows.starts].astype(np.int64)
        return token_ids, rows.starts, table.cache_rows(rows.slots, rows.starts)
    if compiled is None:
        slot_of, places = np.repeat(rows.slots, rows.counts), spans(rows.starts, rows.counts)
        token_ids = table.tokens[slot_of, places].astype(np.int64)
        token_ids[_is_draft(rows)] = draft_ids
        return token_ids, places, table.cache_rows(slot_of, places)
    made = np.empty((3, num_rows), dtype=np.int64)
    columns = [np.ascontiguousarray(each) for each in (rows.slots, rows.starts, rows.counts, rows.is_verify, draft_ids)]
    assert num_rows - int(rows.counts[~rows.is_verify].sum()) - np.count_nonzero(rows.is_verify) == len(draft_ids)
    compiled.gather_rows(
        host_code.at(table.tokens),
        table.tokens.shape[1],
        host_code.at(table.pages),
        table.pages.shape[1],
        table.page_size,
        *map(host_code.at, columns),
        len(rows.slots),
        *map(host_code.at, made),
    )
    return made[0], made[1], made[2]


def page_tables(table: SlotTable, slots: Ints, page_counts: Ints) -> Ints:
    """The pages of these sequences, one after the other's."""
    compiled = host_code.library()
    if compiled is None:
        places = np.arange(page_counts.max(initial=0))
        pages: Ints = table.pages[slots, : len(places)][places < page_counts[:, None]]
        return pages
    tables: Ints = np.empty(int(page_counts.sum()), dtype=np.int64)
    columns = [np.ascontiguousarray(each) for each in (slots, page_counts)]
    compiled.page_tables(
        host_code.at(table.pages), table.pages.shape[1], *map(host_code.at, columns), len(slots), host_code.at(tables)
    )
    return tables


def _scored(table: SlotTable, rows: Rows, positions: Ints) -> dict[str, Ints]:
    """The columns of StepBatch about rows that are to have log-probabilities; none where no row is."""
    if not np.count_nonzero(rows.num_scored):
        return {}
    entry_of, offsets = _entries_and_offsets(rows.counts)
    scored_rows = np.flatnonzero(offsets < rows.num_scored[entry_of])
    scored_tokens = table.tokens[rows.slots[entry_of[scored_rows]], positions[scored_rows] + 1].astype(np.int64)
    num_top = table.num_prompt_logprobs[rows.slots].max(keepdims=True)
    return {"scored_rows": scored_rows, "scored_tokens": scored_tokens, "num_top": num_top}


def _entries_and_offsets(counts: Ints) -> tuple[Ints, Ints]:
    """Of all rows: their entry, and their place in it."""
    return np.repeat(np.arange(len(counts)), counts), spans(np.zeros_like(counts), counts)


def _is_draft(rows: Rows) -> NDArray[np.bool_]:
    """Which rows of all are drafts: those behind the anchor of an entry that verifies."""
    entry_of, offsets = _entries_and_offsets(rows.counts)
    is_draft: NDArray[np.bool_] = rows.is_verify[entry_of] & (offsets > 0)
    return is_draft


def _rows_of(entries: NDArray[np.bool_], counts: Ints) -> Ints:
    """All rows of some entries."""
    if np.count_nonzero(entries) == len(entries):
        return np.arange(int(counts.sum()))
    rows: Ints = entries.repeat(counts).nonzero()[0]
    return rows


def _parents(rows: Rows, drafts: Drafts) -> Ints:
    """Of all rows; empty where all drafts are chains."""
    if not len(drafts.parents) or np.array_equal(drafts.parents, chain_parents(drafts.counts)):
        return no_ints()
    parents = spans(np.full_like(rows.counts, -1), rows.counts)
    parents[_is_draft(rows)] = drafts.parents
    return parents
