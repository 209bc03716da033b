"""N-gram drafts of the sequences on the target, and what they are worth beside a drafter's. A part of the scheduler."""

from __future__ import annotations

import numpy as np

from dflash_ray.core.arrays import Flags, Ints, Tokens
from dflash_ray.core.ngram import IndexingRoom, NgramTable
from dflash_ray.router.draft_rates import DraftRates
from dflash_ray.router.slot_table import MAX_DRAFTS, NGRAM, PLAIN, REMOTE, SlotTable

_INDEXED_AT_ONCE = 2048  # tokens of long texts after which one poll indexes no further text; some half a millisecond
_NOT_LOOKED_UP = -1


class NgramDrafts:
    """Each sequence is looked up at most once for the tokens of a moment."""

    def __init__(self, table: SlotTable, rates: DraftRates) -> None:
        self._table = table
        self._rates = rates
        self._ngrams = NgramTable(table.tokens)
        self._lens = np.full(table.num_slots, _NOT_LOOKED_UP, np.int64)
        self._match_lens = np.zeros(table.num_slots, np.int64)
        self._drafts: Tokens = np.zeros((table.num_slots, MAX_DRAFTS), np.uint32)
        self.room = IndexingRoom(_INDEXED_AT_ONCE)

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

    def _look_up(self, slots: Ints, counts: Ints) -> None:
        is_new = self._lens[slots] == _NOT_LOOKED_UP
        if not is_new.all():
            slots, counts = slots[is_new], counts[is_new]
        if len(slots):
            lens = self._table.committed_lens[slots]
            self._ngrams.catch_up(slots, lens, self.room)
            drafts, self._lens[slots], self._match_lens[slots] = self._ngrams.propose(slots, lens, counts)
            self._drafts[slots, : drafts.shape[1]] = drafts

    def take_preferred(self, slots: Ints, counts: Ints) -> Flags:
        """Gives slots at most so many n-gram drafts where these promise more than a drafter's; returns which."""
        self._look_up(slots, counts)
        is_preferred = self._rates.prefers_ngrams(self._match_lens[slots])
        self.take(slots[is_preferred], counts[is_preferred])
        return is_preferred

    def take(self, slots: Ints, counts: Ints) -> None:
        """Gives slots the n-gram's drafts for the next step, at most so many, or none."""
        self._look_up(slots, counts)
        table = self._table
        table.drafts[slots] = self._drafts[slots]
        table.draft_lens[slots] = np.minimum(self._lens[slots], counts)
        table.draft_sources[slots] = np.where(table.draft_lens[slots] > 0, NGRAM, PLAIN)

    def judge(self, slots: Ints, first_tokens: Tokens) -> None:
        """Takes note of whose first draft was the token that came, before it is committed."""
        table = self._table
        has_ngram = self._lens[slots] > 0
        looked_up = slots[has_ngram]
        if len(looked_up):
            is_right = self._drafts[looked_up, 0] == first_tokens[has_ngram]
            self._rates.saw_ngrams(self._match_lens[looked_up], is_right)
        is_drafters = (table.draft_lens[slots] > 0) & (table.draft_sources[slots] >= REMOTE)
        drafted = slots[is_drafters]
        if len(drafted):
            self._rates.saw_drafters(table.drafts[drafted, 0] == first_tokens[is_drafters])
