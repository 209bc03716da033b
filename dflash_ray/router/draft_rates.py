"""How often drafts were right lately, by where they came from: whether a step's n-gram is worth more than a drafter's.

What is compared is the first draft, on which every step passes judgement: on an n-gram's whether it was sent or not, on
a drafter's where it was. The rates are of all sequences of a target group together.
"""

from __future__ import annotations

import numpy as np

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.core.ngram import MAX_NGRAM, MIN_NGRAM

_WEIGHT = 1 / 64  # of the newest observation
# Where nothing was observed yet: an n-gram by the length of its match, measured on SmolLM2's greedy answers.
_NGRAM_START = {2: 0.5, 3: 0.69, 4: 0.74, 5: 0.88}
_DRAFTER_START = 0.6


class DraftRates:
    """Moving averages of first drafts that were right."""

    def __init__(self) -> None:
        self._ngram = np.array([_NGRAM_START.get(size, 0.0) for size in range(MAX_NGRAM + 1)])
        self._drafter = _DRAFTER_START

    def prefers_ngrams(self, match_lens: Ints) -> Flags:
        """Whether n-grams with matches of these lengths have been right more often than the drafters."""
        is_preferred: Flags = self._ngram[match_lens] > self._drafter
        return is_preferred

    def saw_ngrams(self, match_lens: Ints, is_right: Flags) -> None:
        """First drafts of n-grams that were judged, in order."""
        for size in range(MIN_NGRAM, MAX_NGRAM + 1):
            self._ngram[size] = _averaged(float(self._ngram[size]), is_right[match_lens == size])

    def saw_drafters(self, is_right: Flags) -> None:
        """First drafts of drafters that were judged, in order."""
        self._drafter = _averaged(self._drafter, is_right)


def _averaged(average: float, observed: Flags) -> float:
    """The average after these observations, one after the other."""
    kept = (1 - _WEIGHT) ** np.arange(len(observed), -1, -1)
    return float(average * kept[0] + _WEIGHT * (observed @ kept[1:]))
