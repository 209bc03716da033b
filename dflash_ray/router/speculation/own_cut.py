"""Where own drafts are cut that the router never sees: what a row must be worth, in their drafter's own terms."""

from __future__ import annotations

import numpy as np

from dflash_ray.core.arrays import Ints
from dflash_ray.router.speculation.acceptance import observe
from dflash_ray.router.speculation.choice import LEAST_WORTH
from dflash_ray.router.speculation.records import Floats

# The drafter's probability of a draft with all that it follows, in bins; until something was seen a bin is right a
# little less often than its middle says.
_EDGES = np.log([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
_MIDDLES = np.log([0.01, 0.03, 0.07, 0.12, 0.17, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 0.99])
_START = 0.9 * np.exp(_MIDDLES)
_START_WEIGHT = 8.0  # observations that the start stands for
_FADE = 0.99  # of older observations, with each newer one of that bin
_RETURN = 0.002  # of what is known, with each step: what is always cut is never seen again otherwise
_ALL_BUT_CERTAIN = -1e-6


class OwnCut:
    """Knows how often drafts are accepted, with all that they follow, by what their drafter says of them together."""

    def __init__(self) -> None:
        self._seen = np.full(len(_START), _START_WEIGHT)
        self._right = self._seen * _START

    def saw(self, log_probs: Floats, counts: Ints, accepted: Ints) -> None:
        """Takes verdicts on chains: `counts` drafts verified, the first `accepted` kept; -1 where there is none.

        Args:
            log_probs: [n, k] the drafter's; nan where it says nothing.
        """
        index = np.arange(log_probs.shape[1])
        sums = log_probs.cumsum(axis=1)
        is_in = (index < counts[:, None]) & (accepted >= 0)[:, None] & ~np.isnan(sums)
        right = (index < accepted[:, None])[is_in]
        bins = np.searchsorted(_EDGES, sums[is_in])
        self._seen += _RETURN * (_START_WEIGHT - self._seen)
        self._right += _RETURN * (_START_WEIGHT * _START - self._right)
        observe(self._seen, self._right, bins, right, _FADE)

    def least_log_prob(self, worth: float) -> float:
        """Below it drafts, with all that they follow, are not worth so many tokens; 0 where all are."""
        if worth <= LEAST_WORTH:
            return 0.0
        rates = np.maximum.accumulate(self._right / self._seen)
        if worth > rates[-1]:
            return _ALL_BUT_CERTAIN
        return float(np.interp(worth, rates, _MIDDLES))
