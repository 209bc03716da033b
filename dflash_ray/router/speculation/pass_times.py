"""What passes take, learnt from the passes themselves.

Two layers. A linear law over what is in a pass, fitted by non-negative least squares, says something about passes that
were never seen. Buckets of passes alike, each with the median of its last few times, correct it where there were some.
A machine that is slower for a while is slower for all passes: that common factor follows quickly and is kept apart, so
that a time learnt an hour ago still compares with one of now.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import mul
from statistics import median
from typing import Any

import numpy as np

from dflash_ray.router.speculation.records import Floats

KEPT = 15  # times of a bucket, the last ones
_TRUSTED = 4  # times that a bucket needs before it speaks for the machine's speed
_REFIT_EVERY = 64  # observations; the first ones oftener
_DRIFT_WEIGHT = 0.1  # of the newest observation
_SPREAD_WEIGHT = 0.02
_FIRST_SPREAD = 0.05
_MEDIAN_ERROR = 1.57  # of a median, over the mean deviation of a normal law: sqrt(pi / 2) squared
_MOST_DRIFT = math.log(2.0)  # that one observation can speak for
_OLD = 4096  # observations after which a bucket's weight in the law has halved
_EXACT = 16  # counts up to this have a bucket each
_PER_OCTAVE = 6  # buckets above it


def bucket(count: int) -> int:
    """Number of the bucket of a count: its own up to 16, about 12 % wide above."""
    return max(0, count) if count <= _EXACT else _EXACT + round(_PER_OCTAVE * math.log2(count / _EXACT))


@dataclass(slots=True)
class _Bucket:
    """Passes alike.

    Attributes:
        terms: of the law, their moving average over the passes.
        seconds: of the last passes, at the machine's usual speed.
        ratio: what they take over what the law says.
    """

    terms: list[float]
    row: int
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    seen_at: int = 0
    ratio: float = 1.0

    @property
    def median(self) -> float:
        return median(self.seconds)

    def compare(self, law: Sequence[float]) -> None:
        """Its times or the law are others now."""
        trust = 1.0 - 0.5 ** len(self.seconds) if len(self.seconds) < 3 else 1.0
        self.ratio = float(self.median / max(_weighed(law, self.terms), 1e-12)) ** trust


class PassTimes:
    """Seconds of one kind of pass.

    A pass has terms, what the linear law weighs, and a place (group, row): times of one group are interpolated over its
    rows. `prior` is the law's shape where nothing is known, in units of the first time that is seen.

    What is asked most is the time of one pass. Numbers stay Python's, which take a tenth of the time of arrays of one;
    where many passes are asked for, those of the terms that differ are arrays, and so are the seconds.

    Args:
        prior: weight of every term, relative to the time of a pass whose terms are `unit`.
        unit: terms of that pass.
    """

    def __init__(self, prior: Sequence[float], unit: Sequence[float]) -> None:
        self._prior = np.array(prior, float) / float(np.dot(prior, unit))
        self._unit = np.array(unit, float)
        self._law: list[float] = self._prior.tolist()
        self._groups: dict[int, dict[int, _Bucket]] = {}
        self._ratios: dict[int, tuple[Floats, Floats]] = {}
        self._known: dict[tuple[float, ...], float] = {}  # what was asked since the last time that was seen
        self._log_drift = 0.0
        self._spread = _FIRST_SPREAD
        self._num_seen = 0

    @property
    def is_known(self) -> bool:
        """Whether any time was seen."""
        return bool(self._groups)

    @property
    def drift(self) -> float:
        """How much slower the machine is now than usually."""
        return math.exp(self._log_drift)

    def weight(self, term: int) -> float:
        """Seconds that the law gives one more of a term."""
        return self._law[term] * self.drift if self.is_known else 0.0

    def num_seen(self, group: int, row: int) -> int:
        """Times kept of a bucket."""
        cell = self._groups.get(group, {}).get(bucket(row))
        return 0 if cell is None else len(cell.seconds)

    def error(self, group: int, row: int) -> float:
        """How far the time of such passes may be off, as a part of it: one standard error of their median."""
        return _MEDIAN_ERROR * self._spread / math.sqrt(max(1, self.num_seen(group, row)))

    def saw(self, group: int, row: int, terms: Sequence[float], seconds: float) -> None:
        """Takes the time of a pass."""
        if not self._groups:
            scale = seconds * float(np.dot(self._prior, self._unit)) / _weighed(self._prior.tolist(), terms)
            self._law = (self._prior * scale).tolist()
        expected = self.one(group, row, terms)
        cell = self._cell(group, row, terms)
        if len(cell.seconds) >= _TRUSTED:
            surprise = math.log(max(seconds, 1e-9) / max(expected, 1e-9)) - self._log_drift
            surprise = min(_MOST_DRIFT, max(-_MOST_DRIFT, surprise))
            self._log_drift += _DRIFT_WEIGHT * surprise
            self._spread += _SPREAD_WEIGHT * (abs(surprise) - self._spread)
        cell.seconds.append(seconds / self.drift)
        cell.terms = [term + 0.25 * (value - term) for term, value in zip(cell.terms, terms, strict=True)]
        cell.compare(self._law)
        cell.seen_at = self._num_seen
        self._num_seen += 1
        self._ratios.pop(group, None)
        self._known.clear()
        if self._num_seen % _REFIT_EVERY == 0 or self._num_seen < 8 or self._num_seen in (12, 16, 24, 32, 48):
            self._fit()

    def seconds(self, group: int, rows: Floats, terms: Sequence[float | Floats]) -> Floats:
        """Expected now, for passes of one group with rising `rows` [n]. Never falls with the rows."""
        seconds: Floats = np.maximum.accumulate(self.steady(group, rows, terms)) * self.drift
        return seconds

    def steady(self, group: int, row: Any, terms: Sequence[Any]) -> Any:
        """At the machine's usual speed: of one pass, or of those whose rows and terms are arrays."""
        law, (at, ratios) = _weighed(self._law, terms), self._ratios_of(group)
        return law * np.interp(row, at, ratios) if len(at) else law

    def one(self, group: int, row: int, terms: Sequence[float]) -> float:
        """As `steady`, of one pass; a step asks the same several times."""
        key = (group, row, *terms)
        seconds = self._known.get(key)
        if seconds is None:
            seconds = self._known[key] = float(self.steady(group, row, terms))
        return seconds

    def _ratios_of(self, group: int) -> tuple[Floats, Floats]:
        """What a group's buckets take over what the law says, at their rows."""
        if group not in self._ratios:
            cells = sorted(self._groups.get(group, {}).values(), key=lambda cell: cell.row)
            self._ratios[group] = np.array([cell.row for cell in cells], float), np.array([c.ratio for c in cells])
        return self._ratios[group]

    def _cell(self, group: int, row: int, terms: Sequence[float]) -> _Bucket:
        cells = self._groups.setdefault(group, {})
        key = bucket(row)
        if key not in cells:
            cells[key] = _Bucket(list(terms), row)
        return cells[key]

    def _fit(self) -> None:
        """The law over all buckets, by relative error, leaning on the prior's shape where there are too few."""
        cells = [cell for group in self._groups.values() for cell in group.values()]
        terms = np.array([cell.terms for cell in cells])
        seconds = np.array([cell.median for cell in cells])
        age = np.array([self._num_seen - cell.seen_at for cell in cells])
        count = np.array([len(cell.seconds) for cell in cells])
        weight = np.sqrt(count * 0.5 ** (age / _OLD)) / seconds
        scale = float(np.median(seconds / (terms @ self._prior)))
        lean = 0.3 * np.maximum(1.0, np.max(terms, axis=0)) / float(np.median(seconds))
        rows = np.vstack([terms * weight[:, None], np.diag(lean)])
        wanted = np.concatenate([seconds * weight, lean * self._prior * scale])
        self._law = _non_negative(rows, wanted).tolist()
        for cell in cells:
            cell.compare(self._law)
        self._ratios.clear()


def _weighed(law: Sequence[float], terms: Sequence[Any]) -> Any:
    """The terms' sum under the law's weights."""
    return sum(map(mul, law, terms))


def _non_negative(rows: Floats, wanted: Floats) -> Floats:
    """Least squares whose negative weights are left out, worst first."""
    squares, products = rows.T @ rows, rows.T @ wanted
    used = np.ones(len(squares), bool)
    weights = np.zeros(len(squares))
    while used.any():
        found = np.linalg.solve(squares[np.ix_(used, used)], products[used])
        if (found >= 0).all():
            weights[used] = found
            break
        used[np.flatnonzero(used)[int(np.argmin(found))]] = False
    return weights
