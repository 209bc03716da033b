"""The likeliest trees of drafts over the candidates of many blocks.

A tree of n nodes that promises most accepted drafts holds the n likeliest paths from the anchor on, each with all its
beginnings. Its nodes come by falling chance, so the best tree of fewer nodes is a prefix of it, and a chain is the case
in which nothing else is worth a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core.arrays import Ints

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class DraftTrees:
    """Trees of N blocks, all [N, n].

    Attributes:
        slots, candidates: the place of a node's token among the block's candidates.
        parents: 0 is the anchor, k the k-th node.
        log_probs: of a node, given that its parent is right.
    """

    slots: Ints
    candidates: Ints
    parents: Ints
    log_probs: Floats


def likeliest_trees(log_probs: Floats, num_nodes: int, width: int) -> DraftTrees:
    """
    Args:
        log_probs: [N, S, P, k] of a slot's k candidates after each of the P of the slot before; P is 1 where slots are
            independent of each other, and the first slot reads the first alone.
        width: nodes that follow the same node at most.
    """
    num_blocks, num_slots, num_previous, _ = log_probs.shape
    blocks = np.arange(num_blocks)[:, None]
    # Level by level: the likeliest paths of each length are continued, then the likeliest of all lengths are taken.
    totals, previous = np.zeros((num_blocks, 1)), np.zeros((num_blocks, 1), np.int64)
    found: list[tuple[Floats, Floats, Ints, Ints]] = []
    for slot in range(num_slots):
        # [N, paths, k]; no child is likelier than its parent.
        after = np.minimum(log_probs[blocks, slot, previous], 0.0)
        children = _largest(after, width)
        own = np.take_along_axis(after, children, axis=-1)
        reached = (totals[..., None] + own).reshape(num_blocks, -1)
        best = _largest(reached, num_nodes)
        candidates = children.reshape(num_blocks, -1)[blocks, best]
        totals = reached[blocks, best]
        found.append((totals, own.reshape(num_blocks, -1)[blocks, best], candidates, best // children.shape[-1]))
        previous = candidates if num_previous > 1 else np.zeros_like(candidates)
    return _chosen(found, num_nodes)


def _chosen(found: list[tuple[Floats, Floats, Ints, Ints]], num_nodes: int) -> DraftTrees:
    """The likeliest nodes of all levels, numbered in their order: parents are likelier, or come first."""
    totals, log_probs, candidates, above = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    blocks = np.arange(len(totals))[:, None]
    sizes = [level[0].shape[1] for level in found]
    firsts = np.cumsum(sizes) - sizes
    slots = np.repeat(np.arange(len(found)), sizes)
    parents_at = above + np.repeat(np.concatenate(([0], firsts[:-1])), sizes)  # among all; those of the first have none
    order = np.argsort(-totals, axis=1, kind="stable")[:, :num_nodes]
    ranks = np.zeros(totals.shape, np.int64)
    ranks[blocks, order] = np.arange(1, order.shape[1] + 1)
    parents = np.where(slots[order] == 0, 0, ranks[blocks, parents_at[blocks, order]])
    return DraftTrees(slots[order], candidates[blocks, order], parents, log_probs[blocks, order])


def _largest(values: Floats, count: int) -> Ints:
    """Where the `count` largest of the last axis are, or all; in no order."""
    if count >= values.shape[-1]:
        return np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    places: Ints = np.argpartition(values, -count, axis=-1)[..., -count:]
    return places
