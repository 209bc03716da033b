"""Which KV pages are free. Pure bookkeeping: no tensors here."""

from __future__ import annotations

import heapq

_ROOM_TO_GROW = 16  # pages left free behind a new sequence where that is possible


class PageAllocator:
    """Hands out pages, the lowest first, so that a sequence's pages often follow each other and are read as a view."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))
        self._is_free = [True] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` pages, or None when there are not enough; continues after page `after` where it can."""
        if count > len(self._free):
            return None
        run = self._run(count, after)
        if run is not None:
            for page in run:
                self._take(page)
            taken = set(run)
            self._free = [page for page in self._free if page not in taken]
            heapq.heapify(self._free)
            return run
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._take(page)
        return pages

    def free(self, pages: list[int]) -> None:
        """Gives pages back."""
        for page in pages:
            assert not self._is_free[page], f"page {page} is freed twice"
            self._is_free[page] = True
            heapq.heappush(self._free, page)

    def check_integrity(self) -> None:
        """Asserts that every page is either free once or taken."""
        assert sorted(self._free) == [page for page, is_free in enumerate(self._is_free) if is_free]

    def _take(self, page: int) -> None:
        assert self._is_free[page]
        self._is_free[page] = False

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
