"""What a tree of drafts would have accepted: best-first trees over the candidates of a block (arXiv 2604.12989)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Path = tuple[int, ...]  # the rank of the candidate in each slot from the first on


@dataclass(frozen=True, slots=True)
class Candidates:
    """A drafted block: ids int64 and logprobs float32 [S, k], best first in each slot.

    Attributes:
        committed_len: tokens before the first slot.
    """

    committed_len: int
    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]


def best_first_tree(logprobs: NDArray[np.float32], num_nodes: int) -> set[Path]:
    """The `num_nodes` likeliest paths when slots are independent; with a path all its beginnings are in the tree."""
    num_slots, num_candidates = logprobs.shape
    tree: set[Path] = set()
    heap: list[tuple[float, Path]] = [(-float(logprobs[0, 0]), (0,))] if num_slots else []
    while heap and len(tree) < num_nodes:
        cost, path = heapq.heappop(heap)
        tree.add(path)
        slot, rank = len(path) - 1, path[-1]
        if rank + 1 < num_candidates:
            sibling = cost + float(logprobs[slot, rank]) - float(logprobs[slot, rank + 1])
            heapq.heappush(heap, (sibling, (*path[:-1], rank + 1)))
        if slot + 1 < num_slots:
            heapq.heappush(heap, (cost - float(logprobs[slot + 1, 0]), (*path, 0)))
    return tree


def accepted_depth(tree: set[Path], ids: NDArray[np.int64], truth: Sequence[int]) -> int:
    """How many tokens of the true text the tree holds from its root on."""
    path: Path = ()
    for slot_ids, token in zip(ids, truth, strict=False):
        ranks = np.flatnonzero(slot_ids == token)
        if not len(ranks) or (*path, int(ranks[0])) not in tree:
            break
        path = (*path, int(ranks[0]))
    return len(path)


def accepted_by_tree(blocks: Sequence[Candidates], tokens: Sequence[int], num_nodes: int) -> int:
    """Drafts accepted over all blocks of a greedily decoded text, prompt included, with trees in the chain's place.

    The anchors are those that the chain came to; a tree, which gets further, would have skipped some of them.
    """
    return sum(
        accepted_depth(best_first_tree(block.logprobs, num_nodes), block.ids, tokens[block.committed_len :])
        for block in blocks
    )
