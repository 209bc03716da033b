"""Rows that are computed already: full pages by what they are of, so that sequences with equal beginnings share them.

A page's rows are a function of all tokens up to its end, so its name is a hash over these: over the name of the page
before it and its own tokens, from the salt on. Sampling has no part in it. Pages have names once all their rows are
committed and computed; then nothing writes to them any more, so that a shared page needs no copy.

Pure bookkeeping over the tables of `slots.py`. Every rank of a group keeps the same, led through the same changes.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from dflash_ray.sampling.parameters import NO_LOGPROBS
from dflash_ray.target_group.page_allocator import PageAllocator
from dflash_ray.target_group.slots import SlotTable
from dflash_ray.target_group.step import Ints

_NAME_BYTES = 16


class PrefixCache:
    """Names of pages.

    Args:
        table: the sequences; of a slot's pages the first `named_counts` have been looked at here.

    Attributes:
        num_queried, num_found: tokens that sequences were opened with, and those whose rows they found.
    """

    def __init__(self, table: SlotTable, allocator: PageAllocator) -> None:
        self._table = table
        self._allocator = allocator
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._has_features = np.zeros(allocator.num_pages, dtype=np.bool_)
        self._chains: dict[int, list[bytes]] = {}  # by slot: the salt's hash, and the names of the first pages
        self.num_queried = self.num_found = 0
        allocator.on_evict = self._forget

    def open(self, slot: int, salt: bytes) -> None:
        """A sequence has the slot."""
        self._chains[slot] = [blake2b(salt, digest_size=_NAME_BYTES).digest()]
        if self._may_find(slot):
            self.num_queried += int(self._table.committed_lens[slot])

    def close(self, slot: int) -> None:
        """The slot's sequence is over; its pages are the allocator's."""
        del self._chains[slot]

    def find(self, slot: int) -> int:
        """Gives a slot the pages with its next rows, as many as there are, and returns the rows.

        The last known token's row is never among them: it is computed, for a token to be drawn from it.
        """
        table = self._table
        first = self._next_page(slot)
        if first is None:
            return 0
        pages = []
        for place in range(first, self._num_sharable(slot)):
            page = self._page_of.get(self._name(slot, place))
            if page is None or (table.wants_features[slot] and not self._has_features[page]):
                break
            pages.append(page)
        if pages:
            self._allocator.share(pages)
            table.add_pages(slot, pages)
        num_rows = len(pages) * table.page_size
        table.kv_lens[slot] += num_rows
        table.cached_lens[slot] += num_rows
        table.named_counts[slot] += len(pages)
        self.num_found += num_rows
        return num_rows

    def waits(self, slots: Ints, counts: Ints) -> Ints:
        """Of prefills that are to compute `counts` rows: those whose next page one before them fills in this pass.

        Args:
            slots: [n] different ones.
        """
        coming: dict[bytes, bool] = {}
        waiting = []
        page_size = self._table.page_size
        for index, (slot, count) in enumerate(zip(slots.tolist(), counts.tolist(), strict=True)):
            first, wants_features = self._next_page(slot), bool(self._table.wants_features[slot])
            if first is not None and first < self._num_sharable(slot):
                has_features = coming.get(self._name(slot, first))
                if has_features is not None and has_features >= wants_features:
                    waiting.append(index)
                    continue
            start = int(self._table.kv_lens[slot])
            for place in range(start // page_size, (start + count) // page_size):
                coming.setdefault(self._name(slot, place), wants_features)
        return np.array(waiting, dtype=np.int64)

    def name_pages(self, slots: Ints) -> None:
        """Rows of these slots have been committed and computed: pages that are full now can be found."""
        table = self._table
        full_counts = table.kv_lens[slots] // table.page_size
        for index in np.flatnonzero(full_counts > table.named_counts[slots]).tolist():
            slot, count = int(slots[index]), int(full_counts[index])
            for place in range(int(table.named_counts[slot]), count):
                self._add(self._name(slot, place), int(table.pages[slot, place]), bool(table.wants_features[slot]))
            table.named_counts[slot] = count

    def _may_find(self, slot: int) -> bool:
        """Whether the sequence can do without rows of its own: those whose prompts are scored need the hidden ones."""
        return bool(self._table.num_prompt_logprobs[slot] == NO_LOGPROBS)

    def _next_page(self, slot: int) -> int | None:
        """The place of the page behind a slot's; None for a slot that may find none or has begun its next page."""
        place, begun = divmod(int(self._table.kv_lens[slot]), self._table.page_size)
        is_even = not begun and self._table.page_counts[slot] == place
        return place if is_even and self._may_find(slot) else None

    def _num_sharable(self, slot: int) -> int:
        return (int(self._table.committed_lens[slot]) - 1) // self._table.page_size

    def _name(self, slot: int, place: int) -> bytes:
        """The name of a slot's page, whose tokens are all known."""
        chain, size = self._chains[slot], self._table.page_size
        while len(chain) <= place + 1:
            first = (len(chain) - 1) * size
            tokens = self._table.tokens[slot, first : first + size]
            chain.append(blake2b(chain[-1] + tokens.tobytes(), digest_size=_NAME_BYTES).digest())
        return chain[place + 1]

    def _add(self, name: bytes, page: int, has_features: bool) -> None:
        """Takes a page in, unless there is one already that is as good."""
        known = self._page_of.get(name)
        if known is not None:
            if self._has_features[known] or not has_features:
                return
            self._forget(known)
            self._allocator.drop(known)
        self._page_of[name], self._name_of[page] = page, name
        self._has_features[page] = has_features
        self._allocator.keep(page)

    def _forget(self, page: int) -> None:
        """The page is handed out for something else."""
        del self._page_of[self._name_of.pop(page)]
