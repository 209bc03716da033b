"""Where own drafts are cut that the router never sees: what a row must be worth, in their drafter's own terms."""

from __future__ import annotations

import math

import numpy as np

from dflash_ray.core.arrays import Ints
from dflash_ray.router.speculation.choice import LEAST_WORTH
from dflash_ray.router.speculation.records import Floats

_START = 16.0  # of log-probability on both sides: a drafter is taken at its word until then
_FADE = 0.999
_MOST = 4.0  # times what a drafter says, or that part of it


class OwnCut:
    """Knows how the logarithm of the chance that drafts are accepted goes with what their drafter says of them."""

    def __init__(self) -> None:
        self._said = self._held = _START

    def saw(self, log_probs: Floats, survival: Floats, counts: Ints) -> None:
        """Takes chains: the drafter's log-probabilities [n, k], and the chance [n, k] that was expected of them."""
        width = min(log_probs.shape[1], survival.shape[1])
        counts = np.minimum(counts, width)
        said = np.where(np.arange(width) < counts[:, None], log_probs[:, :width], 0.0).sum(axis=1)
        entries = np.flatnonzero((counts > 0) & ~np.isnan(said))
        fade = _FADE ** len(entries)
        held = np.log(np.maximum(LEAST_WORTH, survival[entries, counts[entries] - 1]))
        self._said = self._said * fade - float(np.maximum(said[entries], math.log(LEAST_WORTH)).sum())
        self._held = self._held * fade - float(held.sum())

    def least_log_prob(self, worth: float) -> float:
        """Below it drafts, with all that they follow, are not worth so many tokens; 0 where all are."""
        if worth <= LEAST_WORTH:
            return 0.0
        sharpness = min(_MOST, max(1 / _MOST, self._held / self._said))
        return min(0.0, math.log(worth)) / sharpness
