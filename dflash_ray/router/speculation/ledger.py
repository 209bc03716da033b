"""The account of what speculation has cost and gained against plain decoding, step by step."""

from __future__ import annotations

import math

import numpy as np

WINDOW = 200  # steps
MOST_LOSS = 0.017  # of the plain time of any window; what cannot be foreseen has the rest of 2 %
_CHANCE = 1.25  # standard deviations by which accepted drafts may fall short for no reason,
_BELIEVED = 0.5  # and the part of it that counts even so
_REMEMBERED = 0.9  # of a shortfall, with each step


class Luck:
    """How accepted drafts count in the account: half as they came, half as they were worth, as far as chance goes.

    Few drafts are accepted in some steps of any text. If each run of such steps counted as the loss that it is, an
    account that no gain before them may pay for would soon end what pays. A shortfall beyond chance counts in full: the
    text has changed, or the drafter.
    """

    def __init__(self) -> None:
        self._short = 0.0  # of what was expected lately
        self._variance = 0.0

    def counted(self, worth: float, variance: float, accepted: float) -> float:
        """Drafts that a step counts as having got."""
        missing = worth - accepted
        self._short = max(0.0, _REMEMBERED * self._short + missing)
        self._variance = _REMEMBERED**2 * self._variance + variance
        unexplained = self._short - _CHANCE * math.sqrt(max(0.0, self._variance))
        return worth - max(_BELIEVED * missing, min(missing, unexplained))


class Ledger:
    """The last steps: seconds that they took, and seconds in which plain decoding would have come as far.

    No window of 200 steps may lose more than that part: none that lies behind, and none that ends later, whose steps to
    come may all be plain ones. `room` is what the next step may lose so that this stays true.

    Attributes:
        luck: how the drafts of a step count.
    """

    def __init__(self) -> None:
        self._loss = np.zeros(WINDOW - 1)  # newest last
        self._plain = np.zeros(WINDOW - 1)
        self._count = 0
        self.luck = Luck()
        self.seconds_saved = 0.0
        self.seconds_lost = 0.0

    def add(self, seconds: float, plain_seconds: float, times: int = 1) -> None:
        """Steps that took `seconds` each, for what plain decoding does in `plain_seconds`."""
        loss = seconds - plain_seconds
        self._loss[:-times], self._loss[-times:] = self._loss[times:], loss
        self._plain[:-times], self._plain[-times:] = self._plain[times:], plain_seconds
        self._count = min(self._count + times, WINDOW - 1)
        self.seconds_lost += times * max(0.0, loss)
        self.seconds_saved += times * max(0.0, -loss)

    def room(self, plain_step: float) -> float:
        """Seconds that the next step may lose, if plain steps take `plain_step`; can be negative."""
        lost = np.cumsum(self._loss[::-1][: self._count])
        plain = np.cumsum(self._plain[::-1][: self._count])
        to_come = WINDOW - 1 - np.arange(self._count)
        windows = MOST_LOSS * (plain + to_come * plain_step) - lost
        return float(min(MOST_LOSS * WINDOW * plain_step, windows.min(initial=np.inf)))

    @property
    def loss(self) -> float:
        """Of the last steps, as a part of what plain decoding would have taken; negative where speculation gained."""
        plain = float(self._plain.sum())
        return float(self._loss.sum()) / plain if plain else 0.0
