"""Trees of rows by their parents: how deep every row is, and which rows it follows.

A parent is a row of the same entry, counted from the entry's first row on, which has -1; it comes before its children.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def depths_of(parents: Ints, first_rows: Ints) -> Ints:
    """Distance [T] of every row from its entry's first row, for parents [T] and each row's entry's first row [T]."""
    at = np.where(parents < 0, -1, parents + first_rows)
    depths = (at >= 0).astype(np.int64)  # from a row to the one that it looks at, which is twice as far each time
    while (is_below := at >= 0).any():
        depths = depths + np.where(is_below, depths[at], 0)
        at = np.where(is_below, at[at], -1)
    return depths


def paths_of(parents: Ints, first_rows: Ints, depths: Ints) -> Ints:
    """Rows [T, D] on the way to every row, from its entry's first row on and counted from it; 0 behind the end."""
    rows = np.arange(len(parents))
    paths = np.zeros((len(parents), int(depths.max(initial=0)) + 1), dtype=np.int64)
    at, is_on = rows - first_rows, np.ones(len(parents), dtype=np.bool_)
    for up in range(paths.shape[1]):
        paths[rows[is_on], (depths - up)[is_on]] = at[is_on]
        at = np.where(is_on, parents[np.where(is_on, at + first_rows, 0)], -1)
        is_on = at >= 0
    return paths
