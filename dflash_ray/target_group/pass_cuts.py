"""A step's rows as passes of a fixed number of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dflash_ray.kernels.attention import StepTables
from dflash_ray.kernels.trees import depths_of
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.step import Ints


@dataclass(frozen=True, slots=True)
class PassRows:
    """n rows of a step that are one pass: token_ids, positions, slots [n], and the tables of their entries."""

    token_ids: Ints
    positions: Ints
    slots: Ints
    tables: StepTables


class StepRows:
    """The rows of a step in passes, in their order.

    Entries that draw from several rows, anchors with their drafts, are not cut, and others are where a pass is full: a
    row of a prompt reads what the rows before it have stored, in whichever pass.
    """

    def __init__(self, batch: StepBatch) -> None:
        self._batch = batch
        self._ends = np.cumsum(batch.entry_lens)
        self._firsts = self._ends - batch.entry_lens
        entry_of = np.searchsorted(self._ends, batch.sample_rows, side="right")
        self._is_whole = np.bincount(entry_of, minlength=len(self._ends)) > 1
        self._page_ends = np.cumsum(batch.page_counts)

    def fits(self, num_rows: int, most_depth: int) -> bool:
        """Whether no entry that is not cut is longer than a pass, nor a path of its drafts longer than may be."""
        lens, parents = self._batch.entry_lens, self._batch.parents
        longest = int(lens[self._is_whole].max(initial=0))
        if longest <= min(num_rows, most_depth):
            return True
        if longest > num_rows or not len(parents):
            return False
        depths = depths_of(parents, np.repeat(self._firsts, lens))
        return int(depths[np.repeat(self._is_whole, lens)].max()) < most_depth

    def cuts(self, num_rows: int) -> list[slice]:
        """Rows of passes of at most so many."""
        cuts, at, total = [], 0, len(self._batch.token_ids)
        while total - at > num_rows:
            stop = at + num_rows
            entry = int(np.searchsorted(self._ends, stop))
            if self._is_whole[entry] and stop < self._ends[entry]:
                stop = int(self._firsts[entry])
            cuts.append(slice(at, stop))
            at = stop
        return [*cuts, slice(at, total)]

    def part(self, rows: slice) -> PassRows:
        """One pass. What of an entry was in the pass before is context now."""
        batch = self._batch
        first, last = np.searchsorted(self._ends, (rows.start, rows.stop - 1), side="right").tolist()
        entries = slice(first, last + 1)
        firsts = np.maximum(self._firsts[entries], rows.start)
        skipped = firsts - self._firsts[entries]
        lens = np.minimum(self._ends[entries], rows.stop) - firsts
        page_at = self._page_ends[first] - batch.page_counts[first]
        tables = StepTables(
            entry_lens=lens,
            context_lens=batch.context_lens[entries] + skipped,
            page_counts=batch.page_counts[entries],
            pages=batch.pages[page_at : self._page_ends[last]],
            parents=batch.parents[rows] - np.repeat(skipped, lens) if len(batch.parents) else batch.parents,
        )
        return PassRows(batch.token_ids[rows], batch.positions[rows], batch.slots[rows], tables)


def within(rows: Ints, part: slice) -> slice:
    """Places of those of ascending rows that lie in a part."""
    return slice(*np.searchsorted(rows, (part.start, part.stop)).tolist())
