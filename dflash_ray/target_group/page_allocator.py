"""Which KV pages are free. Pure bookkeeping: no tensors here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_ROOM_TO_GROW = 16  # pages left free behind a new sequence where that is possible


class PageAllocator:
    """Hands out pages, the lowest first, so that a sequence's pages often follow each other and are read as a view."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._is_free = np.ones(num_pages, dtype=np.bool_)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` pages, or None when there are not enough; continues after page `after` where it can."""
        if count > self.num_free:
            return None
        first = self._first_of_run(count, after)
        pages = np.flatnonzero(self._is_free)[:count] if first is None else np.arange(first, first + count)
        self._take(pages)
        found: list[int] = pages.tolist()
        return found

    def allocate_next(self, after: Ints) -> Ints:
        """One page for each of n different pages `after`, at most as many as are free: the next one where it can."""
        pages = after + 1
        is_next = pages < self.num_pages
        is_next[is_next] = self._is_free[pages[is_next]]
        self._take(pages[is_next])
        if not is_next.all():
            pages[~is_next] = np.flatnonzero(self._is_free)[: len(pages) - int(is_next.sum())]
            self._take(pages[~is_next])
        return pages

    def free(self, pages: list[int]) -> None:
        """Gives pages back."""
        assert not self._is_free[pages].any(), f"of pages {pages} some are freed twice"
        self._is_free[pages] = True
        self.num_free += len(pages)

    def check_integrity(self) -> None:
        """Asserts that the count of free pages is the number of those that are free."""
        assert int(self._is_free.sum()) == self.num_free

    def _take(self, pages: Ints) -> None:
        assert self._is_free[pages].all()
        self._is_free[pages] = False
        self.num_free -= len(pages)

    def _first_of_run(self, count: int, after: int | None) -> int | None:
        """The first of consecutive free pages: right after `after`, or in the first gap that leaves room to grow."""
        if after is not None:
            behind = self._is_free[after + 1 : after + 1 + count]
            return after + 1 if len(behind) == count and behind.all() else None
        edges = np.flatnonzero(np.diff(self._is_free, prepend=False, append=False))  # of gaps: begin, end, begin, ...
        begins, ends = edges[::2], edges[1::2]
        fits = np.flatnonzero(ends - begins >= 2 * count + _ROOM_TO_GROW)
        return int(begins[fits[0]]) if len(fits) else None
