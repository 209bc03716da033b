"""One ragged pass over the target: rows of prompts' chunks and anchors with their drafts, gathered from the slots."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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
    firsts = np.cumsum(counts) - counts
    entry_of = np.repeat(np.arange(len(slots)), counts)
    offsets = np.arange(len(entry_of)) - firsts[entry_of]
    positions = places = starts[entry_of] + offsets  # a row's place among the sequence's rows in the cache
    slot_of = slots[entry_of]
    token_ids = table.tokens[slot_of, places].astype(np.int64)
    is_draft = rows.is_verify[entry_of] & (offsets > 0)
    token_ids[is_draft] = drafts.token_ids
    parents = _parents(drafts, is_draft, offsets)
    if len(parents):
        positions = starts[entry_of] + depths_of(parents, firsts[entry_of])
    page_counts = table.page_counts[slots]
    wants_features = table.wants_features[slots]
    roots = np.where(rows.is_verify, 0, counts - 1)  # of an entry's rows that draw, the first
    if roots.any():
        sample_rows = np.flatnonzero(rows.draws[entry_of] & (offsets >= roots[entry_of]))
    else:
        sample_rows = _rows_of(rows.draws, entry_of)
    num_features = np.where(wants_features, counts, 0)
    first_features = np.cumsum(num_features) - num_features
    is_scored = rows.num_scored.any()
    scored_rows = np.flatnonzero(offsets < rows.num_scored[entry_of]) if is_scored else no_ints()
    batch = StepBatch(
        token_ids=token_ids,
        positions=positions,
        slots=table.cache_rows(slot_of, places),
        entry_lens=counts,
        context_lens=starts,
        page_counts=page_counts,
        pages=_page_tables(table, slots, page_counts),
        sample_rows=sample_rows,
        feature_rows=_rows_of(wants_features, entry_of),
        scored_rows=scored_rows,
        scored_tokens=table.tokens[slot_of[scored_rows], positions[scored_rows] + 1].astype(np.int64),
        num_top=table.num_prompt_logprobs[slots].max(initial=0, keepdims=True) if len(scored_rows) else no_ints(),
        parents=parents,
    )
    draws = rows.draws
    drawing = DrawRows(
        slots=slots[draws],
        num_rows=(counts - roots)[draws],
        positions=(starts + roots)[draws],
        token_ids=token_ids[sample_rows],
        feature_rows=np.where(wants_features, first_features + roots, -1)[draws],
    )
    if len(parents):
        drawing.parents = np.where(is_draft, parents, -1)[sample_rows]
    if len(drafts.num_candidates):
        drawing.num_candidates = np.zeros(len(slots), dtype=np.int64)
        drawing.num_candidates[rows.is_verify] = drafts.num_candidates
        drawing.num_candidates = drawing.num_candidates[draws]
        drawing.candidate_ids, drawing.candidate_probs = drafts.candidate_ids, drafts.candidate_probs
    return batch, drawing


def _rows_of(entries: NDArray[np.bool_], entry_of: Ints) -> Ints:
    """All rows of some entries."""
    return np.arange(len(entry_of)) if entries.all() else np.flatnonzero(entries[entry_of])


def _parents(drafts: Drafts, is_draft: NDArray[np.bool_], offsets: Ints) -> Ints:
    """Of all rows; empty where all drafts are chains."""
    if not len(drafts.parents) or np.array_equal(drafts.parents, chain_parents(drafts.counts)):
        return no_ints()
    parents = offsets - 1
    parents[is_draft] = drafts.parents
    return parents


def _page_tables(table: SlotTable, slots: Ints, page_counts: Ints) -> Ints:
    places = np.arange(page_counts.max(initial=0))
    pages: Ints = table.pages[slots, : len(places)][places < page_counts[:, None]]
    return pages
