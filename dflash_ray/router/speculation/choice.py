"""How many rows of drafts a step verifies, and for whom: whatever promises most tokens a second.

Candidates are all slots of all sequences, each worth the chance that it and all before it are accepted. Rows are added
by falling worth; since a slot is never worth more than the one before it, what is chosen of a sequence is a prefix.
Before drafting nothing is sorted: worths are counted in narrow bins, which is enough to know what the best n come to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.router.speculation.records import Floats

_BINS = 64  # of worth, from 1 downwards
_BINS_PER_E = 10.0
LEAST_WORTH = float(np.exp(-(_BINS - 1) / _BINS_PER_E))  # less is worth no row
_HALVINGS = 6
_EVEN = 32  # numbers of rows up to which each is looked at
_NOTHING = np.zeros(1)


@dataclass(frozen=True, slots=True)
class Worths:
    """What drafts promise, by who is drafted for: all for whom it may help, the better half of them, ..., nobody.

    Attributes:
        num_drafted: [L] sequences whose drafter is asked.
        rank: of every sequence, by how much its drafter helps; the first ones are drafted for.
        rows: [G] numbers of rows of drafts, rising from 0.
        gains: [L, G] tokens expected of the best so many.
    """

    num_drafted: Ints
    rank: Ints
    rows: Ints
    gains: Floats


@lru_cache(maxsize=64)
def row_grid(most: int) -> Ints:
    """Numbers of rows worth a look: all up to 32, then in steps of an eighth of the power of two below."""
    grid = list(range(min(most, _EVEN) + 1))
    while grid[-1] < most:
        grid.append(min(most, grid[-1] + (1 << (grid[-1].bit_length() - 4))))
    return np.array(grid, np.int64)


def worths(drafted: Floats, others: Floats, max_rows: int) -> Worths:
    """
    Args:
        drafted: [n, k] survival of what drafters would draft, falling along a sequence; 0 where none can.
        others: [n, k] survival of what is there without a drafter.
        max_rows: of drafts.
    """
    gain = np.add.reduce(drafted, axis=1) - np.add.reduce(others, axis=1)
    num_drafted = _halves(int(np.count_nonzero(gain > 0)))
    rank = np.empty(len(gain), np.int64)
    rank[np.argsort(-gain)] = np.arange(len(gain))
    # In how many levels a sequence is drafted for, from the first on: levels shrink, and so does who is in them.
    in_levels = (-num_drafted).searchsorted(-rank, side="left")
    slots, tokens = _by_level(_histograms(drafted, others, in_levels, len(num_drafted)))
    rows = row_grid(_rounded(min(max_rows, int(slots[:, -1].max()))))
    # Slots of a bin count as worth the same.
    gains = np.array([np.interp(rows, *columns) for columns in zip(slots, tokens, strict=True)])
    return Worths(num_drafted, rank, rows, gains)


@lru_cache(maxsize=64)
def _halves(count: int) -> Ints:
    halves = [count >> level for level in range(_HALVINGS) if count >> level]
    return np.array([*halves, 0], np.int64)


def _rounded(rows: int) -> int:
    """So that few different grids are made."""
    return rows if rows <= _EVEN else -(-rows // _EVEN) * _EVEN


def _histograms(drafted: Floats, others: Floats, in_levels: Ints, num_levels: int) -> Floats:
    """Slots and their worth in every bin, [2, 2, num_levels + 1, bins]: of drafters' drafts and of others."""
    survival = np.concatenate((drafted, others))
    lines, slots = (survival > LEAST_WORTH).nonzero()
    worth = survival[lines, slots]
    first_cells = np.concatenate((in_levels, in_levels + num_levels + 1)) * _BINS
    cells = first_cells[lines] + (np.log(worth) * -_BINS_PER_E).astype(np.int64)
    size = 2 * (num_levels + 1) * _BINS
    both: Floats = np.empty((2, 2, num_levels + 1, _BINS))  # slots and worths
    both[0].reshape(-1)[:] = np.bincount(cells, minlength=size)
    both[1].reshape(-1)[:] = np.bincount(cells, worth, minlength=size)
    return both


def _by_level(histograms: Floats) -> Floats:
    """[2, L, bins + 1]: sums over bins from the best on, with drafters' drafts for who is in a level, others' else."""
    drafted, others = histograms[:, 0], histograms[:, 1]
    of_levels = np.zeros((2, drafted.shape[1] - 1, _BINS + 1))
    from_end = np.add.accumulate(drafted[:, ::-1], axis=1)[:, ::-1]
    of_levels[:, :, 1:] = from_end[:, 1:] + np.add.accumulate(others, axis=1)[:, :-1]
    return np.add.accumulate(of_levels, axis=2)


def best_rows(survival: Floats, max_rows: int) -> tuple[Ints, Floats]:
    """Numbers of rows [G] and the tokens expected of the best so many, for drafts that are there."""
    worth = np.sort(survival, axis=None)[::-1]
    most = min(max_rows, int(np.count_nonzero(worth > LEAST_WORTH)))
    rows = row_grid(_rounded(most))
    gains = np.add.accumulate(np.concatenate((_NOTHING, worth[:most])))
    return rows, gains[np.minimum(rows, most)]


def share(survival: Floats, num_rows: int) -> Ints:
    """The `num_rows` best slots, or all that are worth anything, as a number for each sequence."""
    if num_rows <= 0:
        return np.zeros(len(survival), np.int64)
    flat = survival.ravel()
    least = float(np.partition(flat, len(flat) - num_rows)[len(flat) - num_rows]) if num_rows < len(flat) else 0.0
    least = max(least, LEAST_WORTH)
    is_in = survival >= least
    counts: Ints = np.count_nonzero(is_in, axis=1).astype(np.int64)
    surplus = int(counts.sum()) - num_rows
    while surplus > 0:  # slots that are worth the same as the last one that fits
        last = survival[np.arange(len(counts)), np.maximum(counts - 1, 0)]
        equal = np.flatnonzero((counts > 0) & (last == least))[:surplus]
        counts[equal] -= 1
        surplus -= len(equal)
    return counts


def is_drafted(worths: Worths, level: int) -> Flags:
    """Of each sequence, whether its drafter is asked."""
    is_asked: Flags = worths.rank < worths.num_drafted[level]
    return is_asked


def until(survival: Floats, lens: Ints) -> Floats:
    """Survival [n, k], zero behind the end of each sequence's drafts."""
    return np.where(np.arange(survival.shape[1]) < lens[:, None], survival, 0.0)
