"""Drafts of the group's own drafter, from the step behind which they are made to the one that verifies them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dflash_ray.core.arrays import spans
from dflash_ray.core.draft_blocks import BlockColumns, DraftBlock
from dflash_ray.kernels.columns import IntColumn
from dflash_ray.target_group.slots import NO_SLOT, SlotTable
from dflash_ray.target_group.step import Drafts, Floats, Ints, StepInput, chain_parents, no_floats, no_ints


@dataclass(frozen=True, slots=True)
class OwnVerified:
    """The own drafts of a step's V verify entries.

    Attributes:
        counts: [V], or empty where the step named none.
        log_probs: [n] of all of them, their drafter's own; of a tree's given their parents.
        parents: [n] as in `Drafts`; empty where all are chains.
    """

    counts: Ints = field(default_factory=no_ints)
    log_probs: Floats = field(default_factory=no_floats)
    parents: Ints = field(default_factory=no_ints)


class OwnDrafts:
    """Of each slot the block that was made last; it is of use while its sequence has the tokens that it follows."""

    def __init__(self) -> None:
        self._lens = no_ints()  # [N] committed_len of the sequence when its block was made; 0 where there is none
        self._counts = no_ints()
        self._tokens = np.zeros((0, 0), dtype=np.int64)  # [N, W]
        self._log_probs = np.zeros((0, 0), dtype=np.float32)
        self._parents = np.zeros((0, 0), dtype=np.int64)
        self._has_trees = False
        self._drawn: dict[int, DraftBlock] = {}

    def keep(self, slots: Ints, blocks: BlockColumns) -> None:
        """Blocks of the sequences in these slots."""
        self._drop_drawn(slots.tolist())
        width = int(blocks.num_slots.max(initial=0))
        self._make_room(int(slots.max(initial=0)) + 1, width)
        every = np.arange(len(blocks))
        places, _ = blocks.draft_places(every, width)
        self._lens[slots], self._counts[slots] = blocks.committed_lens, blocks.num_slots
        self._tokens[slots, :width] = blocks.candidate_ids[places]
        self._log_probs[slots, :width] = blocks.log_probs[places]
        self._has_trees |= len(blocks.parents) > 0
        if self._has_trees:
            self._parents[slots, :width] = blocks.parents_of(every, width)
        for index in blocks.is_drawn.nonzero()[0].tolist():
            self._drawn[int(slots[index])] = blocks.block(index)

    def forget(self, slots: list[int]) -> None:
        """The slots may be other sequences' from here on."""
        self._lens[[slot for slot in slots if slot < len(self._lens)]] = 0
        self._drop_drawn(slots)

    def resolve(self, table: SlotTable, step: StepInput) -> OwnVerified:
        """Puts those into the step that its entries name and that can be of use, as drafts like any others."""
        slots = table.slots(step.verify_ids)
        self._make_room(int(slots.max(initial=0)) + 1, 0)
        lens = table.committed_lens[slots]
        room = table.sampling.ints[slots, IntColumn.MAX_LEN] - lens - 1
        counts = np.minimum(np.minimum(step.own_counts, self._counts[slots]), room)
        is_of_now = (slots != NO_SLOT) & (self._lens[slots] == lens)
        counts = np.where(is_of_now, np.maximum(counts, 0), 0)
        width = int(counts.max(initial=0))
        if not width:
            return OwnVerified(counts)
        log_probs, parents = self._log_probs[slots, :width], self._parents[slots, :width]
        if step.least_own_log_prob < 0:
            sums = _sums_of_paths(log_probs, parents) if self._has_trees else log_probs.cumsum(axis=1)
            num_likely = np.count_nonzero(np.logical_and.accumulate(sums >= step.least_own_log_prob, axis=1), axis=1)
            is_drawn = np.array([slot in self._drawn for slot in slots.tolist()])
            counts = np.where(is_drawn, counts, np.minimum(counts, num_likely))
        is_in = np.arange(width) < counts[:, None]
        own = Drafts(counts, self._tokens[slots, :width][is_in])
        if self._has_trees:
            own.parents = parents[is_in]
        self._add_drawn(slots.tolist(), own)
        step.drafts = own if not step.drafts.counts.any() else _joined(step.drafts, own)
        return OwnVerified(counts, log_probs[is_in], own.parents)

    def _add_drawn(self, slots: list[int], drafts: Drafts) -> None:
        """Adds what those among the drafts were drawn from that were drawn."""
        counts = drafts.counts.tolist()
        blocks = [self._drawn.get(slot) if count else None for slot, count in zip(slots, counts, strict=True)]
        drawn = [(block, count) for block, count in zip(blocks, counts, strict=True) if block is not None]
        if drawn:
            drafts.num_candidates = np.array([0 if block is None else block.candidate_ids.shape[1] for block in blocks])
            drafts.candidate_ids = np.concatenate([block.candidate_ids[:count].ravel() for block, count in drawn])
            drafts.candidate_ids = drafts.candidate_ids.astype(np.int64)
            log_probs = np.concatenate([block.log_probs[:count].ravel() for block, count in drawn])
            drafts.candidate_probs = np.exp(log_probs.astype(np.float64)).astype(np.float32)

    def _drop_drawn(self, slots: list[int]) -> None:
        if self._drawn:
            for slot in slots:
                self._drawn.pop(slot, None)

    def _make_room(self, num_slots: int, width: int) -> None:
        """For so many slots, and blocks so long."""
        more = max(0, num_slots - len(self._lens))
        wider = max(0, width - self._tokens.shape[1])
        if more or wider:
            more = more and max(more, len(self._lens))
            self._lens, self._counts = np.pad(self._lens, (0, more)), np.pad(self._counts, (0, more))
            size = ((0, more), (0, wider))
            self._tokens, self._log_probs = np.pad(self._tokens, size), np.pad(self._log_probs, size)
            parents = np.tile(np.arange(self._tokens.shape[1]), (len(self._lens), 1))
            parents[: self._parents.shape[0], : self._parents.shape[1]] = self._parents
            self._parents = parents


def _sums_of_paths(log_probs: Floats, parents: Ints) -> Floats:
    """Log-probabilities [n, k] of drafts with all that they follow; `parents` [n, k] as in `Drafts`."""
    sums = np.zeros((len(log_probs), log_probs.shape[1] + 1), dtype=np.float32)
    entries = np.arange(len(log_probs))
    for node in range(log_probs.shape[1]):
        sums[:, node + 1] = sums[entries, parents[:, node]] + log_probs[:, node]
    return sums[:, 1:]


def _joined(first: Drafts, second: Drafts) -> Drafts:
    """The drafts of both, of which each entry has some in one at most."""
    nodes = _in_turn(first.counts, second.counts)
    joined = Drafts(first.counts + second.counts, np.concatenate((first.token_ids, second.token_ids))[nodes])
    both = (first, second)
    if len(first.parents) or len(second.parents):
        parents = [one.parents if len(one.parents) else chain_parents(one.counts) for one in both]
        joined.parents = np.concatenate(parents)[nodes]
    if len(first.num_candidates) or len(second.num_candidates):
        nums = [one.num_candidates if len(one.num_candidates) else np.zeros_like(one.counts) for one in both]
        nums = [np.where(one.counts > 0, num, 0) for one, num in zip(both, nums, strict=True)]
        candidates = _in_turn(first.counts * nums[0], second.counts * nums[1])
        joined.num_candidates = nums[0] + nums[1]
        joined.candidate_ids = np.concatenate((first.candidate_ids, second.candidate_ids))[candidates]
        joined.candidate_probs = np.concatenate((first.candidate_probs, second.candidate_probs))[candidates]
    return joined


def _in_turn(first: Ints, second: Ints) -> Ints:
    """Where elements lie in the concatenation of two columns, of which entries have so many: entry by entry."""
    starts = np.where(first > 0, first.cumsum() - first, first.sum() + second.cumsum() - second)
    return spans(starts, first + second)
