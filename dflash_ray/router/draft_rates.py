"""How often drafts were right lately, by where they came from: whether a step's n-gram is worth more than a drafter's.

What is compared is the first draft, on which every step passes judgement: on an n-gram's whether it was sent or not, on
a drafter's where it was. The rates are of all sequences of a target group together.
"""

from __future__ import annotations

from dflash_ray.core.ngram import MAX_NGRAM, MIN_NGRAM

_WEIGHT = 1 / 64  # of the newest observation
# Where nothing was observed yet: an n-gram by the length of its match, measured on SmolLM2's greedy answers.
_NGRAM_START = {2: 0.5, 3: 0.69, 4: 0.74, 5: 0.88}
_DRAFTER_START = 0.6


class DraftRates:
    """Moving averages of first drafts that were right."""

    def __init__(self) -> None:
        self._ngram = {size: _NGRAM_START[size] for size in range(MIN_NGRAM, MAX_NGRAM + 1)}
        self._drafter = _DRAFTER_START

    def prefers_ngram(self, match_len: int) -> bool:
        """Whether an n-gram with a match of this length has been right more often than the drafters."""
        return self._ngram.get(match_len, 0.0) > self._drafter

    def saw_ngram(self, match_len: int, is_right: bool) -> None:
        if match_len in self._ngram:
            self._ngram[match_len] += _WEIGHT * (is_right - self._ngram[match_len])

    def saw_drafter(self, is_right: bool) -> None:
        self._drafter += _WEIGHT * (is_right - self._drafter)
