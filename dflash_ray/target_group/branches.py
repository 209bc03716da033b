"""N-grams of the sequences in slots, for the colocated drafter's trees."""

from __future__ import annotations

import numpy as np

from dflash_ray.core.arrays import Ints
from dflash_ray.core.ngram import IndexingRoom, NgramTable
from dflash_ray.core.ngram_branches import Trees, with_branches
from dflash_ray.models.draft_proposals import DraftProposals
from dflash_ray.target_group.slots import SlotTable

_INDEXED_AT_ONCE = 8192  # tokens of long texts that one pass's drafts index; some two milliseconds


class Branches:
    """Texts are indexed when trees are first drafted for them; chains cost nothing here."""

    def __init__(self) -> None:
        self._ngrams: NgramTable | None = None
        self._num_slots = 0

    def clear(self, slots: list[int]) -> None:
        """The slots are other sequences' from now on."""
        if self._ngrams is not None:
            for slot in slots:
                if slot < self._num_slots:
                    self._ngrams.clear(slot)

    def add(self, table: SlotTable, slots: Ints, proposals: DraftProposals, most: Ints) -> DraftProposals:
        """The same proposals, with branches in those that are trees: at most `most` [N] nodes each."""
        if proposals.parents is None:
            return proposals
        if self._ngrams is None or len(table.tokens) != self._num_slots:
            self._ngrams, self._num_slots = NgramTable(table.tokens.view(np.uint32)), len(table.tokens)
        trees = np.flatnonzero(~proposals.is_drawn)
        rows, lens = slots[trees], table.committed_lens[slots[trees]]
        self._ngrams.catch_up(rows, lens, IndexingRoom(_INDEXED_AT_ONCE))
        found = with_branches(
            Trees(
                proposals.candidate_ids[trees, :, 0].astype(np.uint32),
                proposals.parents[trees],
                proposals.logprobs[trees, :, 0],
                proposals.num_slots[trees],
            ),
            most[trees],
            self._ngrams,
            rows,
            lens,
        )
        return proposals.with_trees(trees, found)
