"""Trees of drafts in the currency of chains: each node is worth the chance that it and all before it are accepted.

Shapes: n sequences with at most k drafts. `parents` [n, k]: 0 is the anchor, j the j-th draft; a parent comes before
its children. Of a chain they are 0, 1, 2, ...
"""

from __future__ import annotations

import numpy as np

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.router.speculation.records import Floats


def depths_of(parents: Ints) -> Ints:
    """Drafts before each on its path [n, k]."""
    depths = np.zeros((len(parents), parents.shape[1] + 1), np.int64)
    rows = np.arange(len(parents))
    for node in range(parents.shape[1]):
        depths[:, node + 1] = depths[rows, parents[:, node]] + 1
    return depths[:, 1:] - 1


def survival_from(rates: Floats, parents: Ints | None = None) -> Floats:
    """The chance [n, k] that each draft and all that it follows are accepted, from those given that these were.

    Without `parents` they are chains.
    """
    if parents is not None:
        return survival_in_trees(rates, parents)
    survival: Floats = np.multiply.accumulate(rates, axis=1)
    return survival


def survival_in_trees(rates: Floats, parents: Ints) -> Floats:
    """The chance [n, k] that drafts are accepted, from those given that their parents were.

    It falls from draft to draft, as the choice of a prefix wants it: who stands behind a lesser one counts as that.
    """
    chances = np.ones((len(rates), rates.shape[1] + 1))
    rows = np.arange(len(rates))
    for node in range(rates.shape[1]):
        chances[:, node + 1] = chances[rows, parents[:, node]] * rates[:, node]
    survival: Floats = np.minimum.accumulate(chances[:, 1:], axis=1)
    return survival


def judged_nodes(parents: Ints, counts: Ints, is_accepted: Flags) -> Flags:
    """On which drafts [n, k] the pass gave judgement: those whose parents were accepted."""
    reached = np.concatenate((np.ones((len(parents), 1), np.bool_), is_accepted), axis=1)
    judged: Flags = np.take_along_axis(reached, parents, axis=1) & (np.arange(parents.shape[1]) < counts[:, None])
    return judged


def by_depth(flags: Flags, depths: Ints) -> Flags:
    """Whether any draft of each depth is one of `flags` [n, k]; [n, k]."""
    found = np.zeros(flags.shape, np.bool_)
    rows, nodes = np.nonzero(flags)
    found[rows, depths[rows, nodes]] = True
    return found
