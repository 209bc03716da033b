"""Pauses between attempts that fail."""

from __future__ import annotations


class BackOff:
    """Each pause is twice the one before, up to the longest.

    Attributes:
        pause_s: the next pause.
    """

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self.pause_s = first_s

    def next(self) -> float:
        """The pause after one more failure, in seconds."""
        pause_s = self.pause_s
        self.pause_s = min(self._longest_s, 2 * pause_s)
        return pause_s

    def reset(self) -> None:
        """An attempt went well."""
        self.pause_s = self._first_s
