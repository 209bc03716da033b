"""N-gram drafts of the sequences that have slots. A part of the scheduler."""

from __future__ import annotations

import numpy as np

from dflash_ray.core.arrays import Flags, Ints, Tokens
from dflash_ray.core.ngram import IndexingRoom, NgramTable
from dflash_ray.router.slot_table import CHAIN, MAX_DRAFTS, NGRAM, PLAIN, SlotTable

_INDEXED_AT_ONCE = 2048  # tokens of long texts after which one poll indexes no further text; some half a millisecond
_NOT_LOOKED_UP = -1


class NgramDrafts:
    """Each sequence is looked up at most once for the tokens of a moment.

    Attributes:
        has_looked_up: something was looked up that was not forgotten.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._ngrams = NgramTable(table.tokens)
        self._lens = np.full(table.num_slots, _NOT_LOOKED_UP, np.int64)
        self._match_lens = np.zeros(table.num_slots, np.int64)
        self._drafts: Tokens = np.zeros((table.num_slots, MAX_DRAFTS), np.uint32)
        self.room = IndexingRoom(_INDEXED_AT_ONCE)
        self.has_looked_up = False

    def make_room(self) -> None:
        """Another poll begins."""
        self.room.left = _INDEXED_AT_ONCE

    def clear(self, slot: int) -> None:
        """The slot is another sequence's now."""
        self._ngrams.clear(slot)
        self._lens[slot] = _NOT_LOOKED_UP

    def forget(self, slots: Ints) -> None:
        """They have got tokens."""
        self._lens[slots] = _NOT_LOOKED_UP
        self.has_looked_up = bool((self._lens != _NOT_LOOKED_UP).any())

    def look_up(self, slots: Ints, counts: Ints) -> tuple[Ints, Ints]:
        """Lengths of the slots' matches, and of what followed them, at most `counts` tokens."""
        is_new = self._lens[slots] == _NOT_LOOKED_UP
        fresh = slots[is_new]
        if len(fresh):
            self.has_looked_up = True
            lens = self._table.committed_lens[fresh]
            self._ngrams.catch_up(fresh, lens, self.room)
            drafts, self._lens[fresh], self._match_lens[fresh] = self._ngrams.propose(fresh, lens, counts[is_new])
            self._drafts[fresh, : drafts.shape[1]] = drafts
        return self._match_lens[slots], np.minimum(self._lens[slots], counts)

    def take(self, slots: Ints, counts: Ints) -> None:
        """Gives slots so many of the drafts that were looked up for them."""
        table = self._table
        table.drafts[slots] = self._drafts[slots]
        if table.has_trees:
            table.draft_parents[slots] = CHAIN
        table.draft_lens[slots] = counts
        table.draft_sources[slots] = np.where(counts > 0, NGRAM, PLAIN)

    def judged(self, slots: Ints, first_tokens: Tokens) -> tuple[Ints, Flags]:
        """Match lengths of the n-grams that were looked up and not sent, and whether their first token came."""
        is_idle = (self._lens[slots] > 0) & (self._table.draft_sources[slots] != NGRAM)
        idle = slots[is_idle]
        return self._match_lens[idle], self._drafts[idle, 0] == first_tokens[is_idle]
