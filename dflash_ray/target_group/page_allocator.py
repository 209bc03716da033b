"""Which KV pages are free. Pure bookkeeping: no tensors here."""

from __future__ import annotations

import heapq

_ROOM_TO_GROW = 16  # pages left free behind a new sequence where that is possible


class PageAllocator:
    """Hands out pages, the lowest first, so that a sequence's pages often follow each other and are read as a view."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._is_free = [True] * num_pages
        self._queue = list(range(num_pages))  # a heap of all free pages, and of some that were taken in runs

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` pages, or None when there are not enough; continues after page `after` where it can."""
        if count > self.num_free:
            return None
        pages = self._run(count, after)
        if pages is not None:
            for page in pages:
                self._take(page)
            return pages
        pages = []
        while len(pages) < count:
            page = heapq.heappop(self._queue)
            if self._is_free[page]:
                self._take(page)
                pages.append(page)
        return pages

    def free(self, pages: list[int]) -> None:
        """Gives pages back."""
        for page in pages:
            assert not self._is_free[page], f"page {page} is freed twice"
            self._is_free[page] = True
            heapq.heappush(self._queue, page)
        self.num_free += len(pages)
        if len(self._queue) > 2 * self.num_pages:
            self._queue = [page for page, is_free in enumerate(self._is_free) if is_free]

    def check_integrity(self) -> None:
        """Asserts that every page is either free or taken, and that all free ones can be found."""
        free = {page for page, is_free in enumerate(self._is_free) if is_free}
        assert len(free) == self.num_free and free <= set(self._queue)

    def _take(self, page: int) -> None:
        assert self._is_free[page]
        self._is_free[page] = False
        self.num_free -= 1

    def _run(self, count: int, after: int | None) -> list[int] | None:
        """Consecutive free pages: right after `after`, or from the first gap that leaves room to grow."""
        if after is not None:
            run = list(range(after + 1, after + 1 + count))
            return run if run[-1] < self.num_pages and all(self._is_free[page] for page in run) else None
        length = 0
        for page, is_free in enumerate(self._is_free):
            length = length + 1 if is_free else 0
            if length == 2 * count + _ROOM_TO_GROW:
                first = page - length + 1
                return list(range(first, first + count))
        return None
