"""Tokens to text as they come: never half a character, and never text that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dflash_ray.gateway.tokenizer import ChatTokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of one growing sequence of tokens; all pieces together are the text of all tokens."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # tokens since the last safe point, one emitted token before them
        self._emitted = ""  # text of the part of `_pending` that has been emitted

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that is sure; bytes of an incomplete character wait."""
        self._pending.extend(token_ids)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(_REPLACEMENT):
            return ""
        new = text[len(self._emitted) :]
        # The next text is decoded together with this one, for decoders that look at the token before.
        self._pending = self._pending[-1:]
        self._emitted = self._tokenizer.decode(self._pending)
        if self._emitted.endswith(_REPLACEMENT) or not text.endswith(self._emitted):
            self._pending, self._emitted = [], ""
        return new

    def flush(self) -> str:
        """What is left at the end, incomplete characters included."""
        new = self._tokenizer.decode(self._pending)[len(self._emitted) :]
        self._pending, self._emitted = [], ""
        return new


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Text that may be shown, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopStrings:
    """Finds the first stop string in a stream of text, however it is cut into pieces."""

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._stops = list(stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> StopMatch:
        """Text that cannot be part of a stop string any more; the rest is held back."""
        if not self._stops:
            return StopMatch(text)
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda item: (item[0], -len(item[1])))
            shown = self._held[: at + len(stop)] if self._include_stop else self._held[:at]
            self._held = ""
            return StopMatch(shown, stop)
        keep = max(self._overlap(stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return StopMatch(shown)

    def flush(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if stop.startswith(self._held[-size:])), 0)
