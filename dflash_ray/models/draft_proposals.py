"""What a draft pass proposes, for one sequence and for many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.core.draft_blocks import BlockColumns
from dflash_ray.core.ngram_branches import Trees


@dataclass(frozen=True, slots=True)
class DraftProposal:
    """Candidates of one sequence: ids int64 [n, k] of the target's vocabulary, log-probabilities float32 [n, k].

    The first candidate of a slot is the draft; the others follow by falling probability. With `is_drawn` the draft was
    drawn from these probabilities, which then are of all candidates that had a chance.

    With `parents` int64 [n] it is a tree: a node in each slot, likelier ones first, its parent (0 is the anchor, k the
    k-th node), and its log-probability given its parent.
    """

    candidate_ids: Tensor
    logprobs: Tensor
    is_drawn: bool = False
    parents: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DraftProposals:
    """Those of N sequences, on the host; what lies beyond a sequence's own slots and candidates means nothing.

    Attributes:
        candidate_ids, logprobs: int64 and float32 [N, S, K].
        num_slots, num_candidates: [N].
        is_drawn: [N].
        parents: [N, S], those of a chain being 0, 1, 2, ...; None where all are chains.
    """

    candidate_ids: Ints
    logprobs: NDArray[np.float32]
    num_slots: Ints
    num_candidates: Ints
    is_drawn: Flags
    parents: Ints | None = None

    @classmethod
    def of(cls, proposals: Sequence[DraftProposal]) -> DraftProposals:
        """Proposals that were made one by one."""
        shapes = np.array([one.candidate_ids.shape for one in proposals], dtype=np.int64).reshape(-1, 2)
        size = (len(proposals), *shapes.max(axis=0, initial=0).tolist())
        ids, logprobs = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.float32)
        for place, (one, shape) in enumerate(zip(proposals, shapes.tolist(), strict=True)):
            ids[place, : shape[0], : shape[1]] = one.candidate_ids.cpu().numpy()
            logprobs[place, : shape[0], : shape[1]] = one.logprobs.float().cpu().numpy()
        is_drawn = np.array([one.is_drawn for one in proposals], dtype=bool)
        parents = None
        if any(one.parents is not None for one in proposals):
            parents = np.tile(np.arange(size[1]), (len(proposals), 1))
            for place, one in enumerate(proposals):
                if one.parents is not None:
                    parents[place, : len(one.parents)] = one.parents.numpy()
        return cls(ids, logprobs, shapes[:, 0], shapes[:, 1], is_drawn, parents)

    def __len__(self) -> int:
        return len(self.num_slots)

    def __getitem__(self, place: int) -> DraftProposal:
        if place >= len(self):
            raise IndexError(place)
        part = slice(int(self.num_slots[place])), slice(int(self.num_candidates[place]))
        ids, logprobs = self.candidate_ids[place][part], self.logprobs[place][part]
        parents = None if self.parents is None else torch.from_numpy(self.parents[place][part[0]])
        return DraftProposal(torch.from_numpy(ids), torch.from_numpy(logprobs), bool(self.is_drawn[place]), parents)

    def __iter__(self) -> Iterator[DraftProposal]:
        return map(self.__getitem__, range(len(self)))

    def with_trees(self, places: Ints, trees: Trees) -> DraftProposals:
        """The same, with other trees at some places."""
        num_proposals, num_slots, num_candidates = self.candidate_ids.shape
        num_nodes = trees.tokens.shape[1]
        size = num_proposals, max(num_slots, num_nodes), num_candidates
        ids, logprobs = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.float32)
        ids[:, :num_slots], logprobs[:, :num_slots] = self.candidate_ids, self.logprobs
        ids[places, :num_nodes, 0], logprobs[places, :num_nodes, 0] = trees.tokens, trees.log_probs
        parents, counts = np.tile(np.arange(size[1]), (num_proposals, 1)), self.num_slots.copy()
        if self.parents is not None:
            parents[:, :num_slots] = self.parents
        parents[places, :num_nodes], counts[places] = trees.parents, trees.counts
        return DraftProposals(ids, logprobs, counts, self.num_candidates, self.is_drawn, parents)

    def blocks(self, sequence_ids: Ints, committed_lens: Ints) -> BlockColumns:
        """The proposals as they go on, for these sequences."""
        sizes = self.num_slots * self.num_candidates
        ids, logprobs = self.candidate_ids, self.logprobs
        if int(sizes.sum()) != ids.size:
            _, num_slots, num_candidates = ids.shape
            is_there = (np.arange(num_slots) < self.num_slots[:, None])[:, :, None]
            is_there = is_there & (np.arange(num_candidates) < self.num_candidates[:, None])[:, None]
            ids, logprobs = ids[is_there], logprobs[is_there]
        parents = np.zeros(0, dtype=np.uint32)
        if self.parents is not None:
            is_node = np.arange(self.parents.shape[1]) < self.num_slots[:, None]
            parents = self.parents[is_node].astype(np.uint32)
        return BlockColumns(
            sequence_ids,
            committed_lens,
            self.num_slots,
            self.num_candidates,
            self.is_drawn,
            sizes.cumsum() - sizes,
            ids.reshape(-1).astype(np.uint32),
            logprobs.reshape(-1),
            parents,
        )
