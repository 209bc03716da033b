"""Which KV pages are free, and what of them is worth keeping. Pure bookkeeping: no tensors here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_ROOM_TO_GROW = 16  # pages left free behind a new sequence where that is possible


class PageAllocator:
    """Hands out pages, blank ones first and of these the lowest, so that a sequence's pages often follow each other.

    A page is held by one sequence or several. One that nobody holds any more is free; it is blank unless it was said to
    be kept, and then it stays as it is until no blank page is left. Of kept pages the one goes first that was held last
    the longest ago.

    Attributes:
        num_free: pages that nobody holds.
        on_evict: told of each kept page that is handed out for something else.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self.on_evict: Callable[[int], None] = lambda page: None
        self._holders = np.zeros(num_pages, dtype=np.int64)
        self._is_blank = np.ones(num_pages, dtype=np.bool_)
        self._is_kept = np.zeros(num_pages, dtype=np.bool_)
        self._kept: OrderedDict[int, None] = OrderedDict()  # the free ones among them, the first to go first

    @property
    def num_kept(self) -> int:
        """Free pages that are kept."""
        return len(self._kept)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` pages, or None when there are not enough; continues after page `after` where it can."""
        if count > self.num_free:
            return None
        first = self._first_of_run(count, after)
        pages = self._scattered(count) if first is None else np.arange(first, first + count)
        self._take(pages)
        found: list[int] = pages.tolist()
        return found

    def allocate_next(self, after: Ints) -> Ints:
        """One page for each of n pages `after`, at most as many as are free: the next one where it can."""
        pages = after + 1
        is_next = np.zeros(len(pages), dtype=np.bool_)
        is_next[np.unique(pages, return_index=True)[1]] = True  # who shares a page can't both have the next one
        is_next &= pages < self.num_pages
        is_next[is_next] = self._is_blank[pages[is_next]]
        self._take(pages[is_next])
        if not is_next.all():
            pages[~is_next] = self._scattered(len(pages) - int(is_next.sum()))
            self._take(pages[~is_next])
        return pages

    def share(self, pages: list[int]) -> None:
        """One more sequence holds these kept pages, which others may hold or nobody."""
        assert self._is_kept[pages].all(), f"of pages {pages} some are not kept"
        self.num_free -= int((self._holders[pages] == 0).sum())
        self._holders[pages] += 1
        for page in pages:
            self._kept.pop(page, None)

    def free(self, pages: list[int]) -> None:
        """A sequence holds its pages no more. Of those that are kept its last ones go first."""
        assert (self._holders[pages] > 0).all(), f"of pages {pages} some are freed twice"
        self._holders[pages] -= 1
        freed = np.array(pages, dtype=np.int64)
        freed = freed[self._holders[freed] == 0]
        self.num_free += len(freed)
        is_kept = self._is_kept[freed]
        self._is_blank[freed[~is_kept]] = True
        for page in freed[is_kept][::-1].tolist():
            self._kept[page] = None

    def keep(self, page: int) -> None:
        """A page that is held is worth keeping when it is free."""
        assert self._holders[page], f"page {page} is free"
        self._is_kept[page] = True

    def drop(self, page: int) -> None:
        """A kept page is so no more."""
        self._is_kept[page] = False
        if page in self._kept:
            del self._kept[page]
            self._is_blank[page] = True

    def check_integrity(self) -> None:
        """Asserts that every page is held, blank or kept, and the count of free ones right."""
        assert self._is_blank.sum() + len(self._kept) == self.num_free
        is_free = self._is_blank.copy()
        is_free[list(self._kept)] = True
        assert ((self._holders == 0) == is_free).all()
        assert self._is_kept[list(self._kept)].all() and not self._is_kept[self._is_blank].any()

    def _scattered(self, count: int) -> Ints:
        """Any pages, blank as far as there are blank ones."""
        pages = np.flatnonzero(self._is_blank)[:count]
        if len(pages) == count:
            return pages
        evicted = [self._kept.popitem(last=False)[0] for _ in range(count - len(pages))]
        self._is_kept[evicted] = False
        self._is_blank[evicted] = True
        for page in evicted:
            self.on_evict(page)
        return np.sort(np.concatenate((pages, evicted)))

    def _take(self, pages: Ints) -> None:
        assert self._is_blank[pages].all()
        self._is_blank[pages] = False
        self._holders[pages] = 1
        self.num_free -= len(pages)

    def _first_of_run(self, count: int, after: int | None) -> int | None:
        """The first of consecutive blank pages: right after `after`, or in the first gap that leaves room to grow."""
        if after is not None:
            behind = self._is_blank[after + 1 : after + 1 + count]
            return after + 1 if len(behind) == count and behind.all() else None
        edges = np.flatnonzero(np.diff(self._is_blank, prepend=False, append=False))  # of gaps: begin, end, begin, ...
        begins, ends = edges[::2], edges[1::2]
        fits = np.flatnonzero(ends - begins >= 2 * count + _ROOM_TO_GROW)
        return int(begins[fits[0]]) if len(fits) else None
