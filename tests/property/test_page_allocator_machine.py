"""Who has which page, against a plain set of the free ones."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dflash_ray.target_group.page_allocator import PageAllocator


class PageAllocatorMachine(RuleBasedStateMachine):
    """Sequences open, grow and end in any order, over caches from one page to more than a first gap needs."""

    @initialize(num_pages=st.integers(1, 90))
    def start(self, num_pages):
        self.num_pages = num_pages
        self.allocator = PageAllocator(num_pages)
        self.held: list[list[int]] = []  # pages of each live sequence, in the order they came
        self.free = set(range(num_pages))

    def _take(self, count: int, after: int | None) -> list[int] | None:
        """Asks for pages, and checks what comes."""
        pages = self.allocator.allocate(count, after)
        if count > len(self.free):
            assert pages is None, "no more is given than there is"
            return None
        assert pages is not None, "what is free can be had, however it is scattered"
        assert len(set(pages)) == len(pages) == count
        assert set(pages) <= self.free, "no page is given twice"
        self.free -= set(pages)
        return pages

    @rule(count=st.integers(1, 30))
    def open(self, count):
        pages = self._take(count, None)
        if pages is not None:
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 3))
    def grow(self, data, count):
        pages = data.draw(st.sampled_from(self.held))
        following = range(pages[-1] + 1, pages[-1] + 1 + count)
        has_room = set(following) <= self.free
        new = self._take(count, pages[-1])
        if has_room:
            assert new == list(following), "a sequence goes on behind its last page where that is free"
        pages += new or []

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data):
        pages = data.draw(st.sampled_from(self.held))
        self.held.remove(pages)
        self.allocator.free(pages)
        self.free |= set(pages)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def freeing_what_is_free_is_a_fault(self, data):
        page = data.draw(st.sampled_from(sorted(self.free)))
        with pytest.raises(AssertionError, match="freed twice"):
            self.allocator.free([page])

    @precondition(lambda self: not self.held)
    @rule()
    def an_empty_cache_can_be_had_whole(self):
        pages = self._take(self.num_pages, None)
        assert sorted(pages) == list(range(self.num_pages))
        self.held.append(pages)

    @invariant()
    def every_page_is_free_or_held(self):
        assert self.allocator.num_free == len(self.free)
        assert len(self.free) + sum(map(len, self.held)) == self.num_pages
        self.allocator.check_integrity()


TestPageAllocator = PageAllocatorMachine.TestCase
TestPageAllocator.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
