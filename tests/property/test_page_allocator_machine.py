"""Who has which page, against a plain set of the blank ones and a list of those that are kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dflash_ray.target_group.page_allocator import PageAllocator


class PageAllocatorMachine(RuleBasedStateMachine):
    """Sequences open, grow, share and end in any order, over caches from one page to more than a first gap needs."""

    @initialize(num_pages=st.integers(1, 90))
    def start(self, num_pages):
        self.num_pages = num_pages
        self.allocator = PageAllocator(num_pages)
        self.held: list[list[int]] = []  # pages of each live sequence, in the order they came
        self.free = set(range(num_pages))  # those that are kept among them
        self.kept: set[int] = set()
        self.order: list[int] = []  # of free pages that are kept, the first to go first
        self.evicted: list[int] = []
        self.allocator.on_evict = self.evicted.append

    @property
    def blank(self) -> set[int]:
        return self.free - self.kept

    @property
    def distinct(self) -> set[int]:
        return {page for pages in self.held for page in pages}

    def _take(self, count: int, after: int | None) -> list[int] | None:
        """Asks for pages, and checks what comes."""
        pages = self.allocator.allocate(count, after)
        if count > len(self.free):
            assert pages is None, "no more is given than there is"
            return None
        assert pages is not None, "what is free can be had, however it is scattered"
        assert len(set(pages)) == len(pages) == count
        assert set(pages) <= self.free, "no page is given twice"
        evicted, self.evicted[:] = list(self.evicted), []
        assert len(evicted) == max(0, count - len(self.blank)), "what is kept goes when nothing is blank, not before"
        assert evicted == self.order[: len(evicted)], "what was held last the longest ago goes first"
        assert set(evicted) <= set(pages) and set(pages) - set(evicted) <= self.blank
        del self.order[: len(evicted)]
        self.kept -= set(evicted)
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
        has_room = set(following) <= self.blank
        new = self._take(count, pages[-1])
        if has_room:
            assert new == list(following), "a sequence goes on behind its last page where that is blank"
        pages += new or []

    @precondition(lambda self: self.held)
    @rule()
    def all_grow_by_a_page(self):
        if len(self.held) > len(self.free):
            return
        lasts = [pages[-1] for pages in self.held]
        num_blank, free = len(self.blank), set(self.free)
        new = self.allocator.allocate_next(np.array(lasts)).tolist()
        assert len(set(new)) == len(new) and set(new) <= free
        evicted, self.evicted[:] = list(self.evicted), []
        assert len(evicted) == max(0, len(new) - num_blank) and evicted == self.order[: len(evicted)]
        del self.order[: len(evicted)]
        self.kept -= set(evicted)
        self.free -= set(new)
        for pages, page in zip(self.held, new, strict=True):
            pages.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def keep(self, data):
        pages = data.draw(st.sampled_from(self.held))
        for page in pages[: data.draw(st.integers(1, len(pages)))]:
            self.allocator.keep(page)
            self.kept.add(page)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data):
        page = data.draw(st.sampled_from(sorted(self.kept)))
        self.allocator.drop(page)
        self.kept.remove(page)
        if page in self.free:
            self.order.remove(page)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def share(self, data):
        pages = data.draw(st.lists(st.sampled_from(sorted(self.kept)), min_size=1, unique=True))
        self.allocator.share(pages)
        self.order = [page for page in self.order if page not in pages]
        self.free -= set(pages)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data):
        pages = data.draw(st.sampled_from(self.held))
        self.held.remove(pages)
        self.allocator.free(pages)
        freed = [page for page in pages if page not in self.distinct]
        self.free |= set(freed)
        self.order += [page for page in reversed(freed) if page in self.kept]

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def freeing_what_is_free_is_a_fault(self, data):
        page = data.draw(st.sampled_from(sorted(self.free)))
        with pytest.raises(AssertionError, match="freed twice"):
            self.allocator.free([page])

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def what_is_blank_cannot_be_shared(self, data):
        if self.blank:
            with pytest.raises(AssertionError, match="not kept"):
                self.allocator.share([data.draw(st.sampled_from(sorted(self.blank)))])

    @precondition(lambda self: not self.held)
    @rule()
    def an_empty_cache_can_be_had_whole(self):
        pages = self._take(self.num_pages, None)
        assert sorted(pages) == list(range(self.num_pages))
        self.held.append(pages)

    @invariant()
    def every_page_is_free_or_held(self):
        assert self.allocator.num_free == len(self.free)
        assert len(self.free) + len(self.distinct) == self.num_pages
        assert self.allocator.num_kept == len(self.order)
        self.allocator.check_integrity()


TestPageAllocator = PageAllocatorMachine.TestCase
TestPageAllocator.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
