"""A step's rows as passes of a fixed number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dflash_ray.kernels.fixed_attention import LINE_FIRST, LINE_PAGE, LINE_ROW, MOST_DEPTH, row_lines
from dflash_ray.kernels.trees import depths_of
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.pass_buffers import PassRows
from dflash_ray.target_group.step import Ints


class StepRows:
    """The rows of a step in passes, in their order.

    Entries that draw from several rows, anchors with their drafts, are not cut, and others are where a pass is full: a
    row of a prompt reads what the rows before it have stored, in whichever pass.
    """

    def __init__(self, batch: StepBatch) -> None:
        self._batch = batch
        lens = batch.entry_lens
        self._ends = np.cumsum(lens)
        sampled = np.bincount(np.searchsorted(self._ends, batch.sample_rows, side="right"), minlength=len(lens))
        self._is_whole = sampled > 1
        self._page_ends = np.cumsum(batch.page_counts)

    def fits(self, num_rows: int) -> bool:
        """Whether no entry that cannot be cut is longer than a pass, and no path of drafts longer than one may be."""
        longest = int(self._batch.entry_lens[self._is_whole].max(initial=0))
        if longest <= min(num_rows, MOST_DEPTH):
            return True
        parents = self._batch.parents
        if longest > num_rows or not len(parents):
            return False
        firsts = np.repeat(self._ends - self._batch.entry_lens, self._batch.entry_lens)
        is_whole = np.repeat(self._is_whole, self._batch.entry_lens)
        return int(depths_of(parents, firsts)[is_whole].max()) < MOST_DEPTH

    def cuts(self, num_rows: int) -> list[slice]:
        """Rows of passes of at most so many."""
        cuts, at, total = [], 0, len(self._batch.token_ids)
        while total - at > num_rows:
            stop = at + num_rows
            entry = int(np.searchsorted(self._ends, stop))
            if self._is_whole[entry] and stop < self._ends[entry]:
                stop = int(self._ends[entry] - self._batch.entry_lens[entry])
            cuts.append(slice(at, stop))
            at = stop
        return [*cuts, slice(at, total)]

    def passes(self, cuts: list[slice]) -> Iterator[PassRows]:
        """What each pass reads."""
        batch = self._batch
        lines, paths = row_lines(batch.entry_lens, batch.context_lens, batch.page_counts, batch.parents, self._is_whole)
        for rows in cuts:
            mine = lines[rows].copy()
            mine[:, [LINE_ROW, LINE_FIRST]] -= rows.start
            last = int(np.searchsorted(self._ends, rows.stop - 1, side="right"))
            pages = slice(int(mine[0, LINE_PAGE]), int(self._page_ends[last]))
            mine[:, LINE_PAGE] -= pages.start
            own_paths = None if paths is None else paths[rows]
            columns = (batch.token_ids[rows], batch.positions[rows], batch.slots[rows])
            yield PassRows(*columns, mine, own_paths, batch.pages[pages])


def within(rows: Ints, part: slice) -> slice:
    """Places of those of ascending rows that lie in a part."""
    return slice(*np.searchsorted(rows, (part.start, part.stop)).tolist())
