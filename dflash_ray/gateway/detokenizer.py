"""Tokens to text as they come: never half a character, and never text that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dflash_ray.text.tokenizer import ChatTokenizer

_REPLACEMENT = "\ufffd"
_MAX_UNSURE = 3  # bytes of an incomplete character, each of which may be shown as a replacement
_MAX_PENDING = 64


class Detokenizer:
    """Text of one growing sequence of tokens; all pieces together are the text of all tokens."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # tokens since the last safe point, one emitted token before them
        self._emitted = ""  # text of the part of `_pending` that has been emitted

    def copy(self) -> Detokenizer:
        """Another one that goes on from here."""
        made = Detokenizer(self._tokenizer)
        made._pending, made._emitted = self._pending.copy(), self._emitted
        return made

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that is sure; bytes of an incomplete character wait."""
        if self._tokenizer.joins_bytes and not self._pending:
            text = self._tokenizer.decode_each(token_ids)
            if _REPLACEMENT not in text:
                return text
        self._pending.extend(token_ids)
        text = self._tokenizer.decode(self._pending)
        num_unsure = min(_MAX_UNSURE, len(text) - len(text.rstrip(_REPLACEMENT)))
        new = text[len(self._emitted) : len(text) - num_unsure]
        self._emitted += new
        if not num_unsure and self._tokenizer.joins_bytes:
            self._pending, self._emitted = [], ""
        elif not num_unsure:
            # The next text is decoded together with this one, for decoders that look at the token before.
            self._forget(text, 1)
        elif len(self._pending) > _MAX_PENDING:
            self._forget(text, _MAX_PENDING // 2)
        return new

    def _forget(self, text: str, keep: int) -> None:
        """Goes on with the last `keep` tokens, where they decode alone to the end of the text."""
        kept = self._pending[-keep:]
        last = self._tokenizer.decode_token(kept[0]) if len(kept) == 1 else self._tokenizer.decode(kept)
        num_held = len(text) - len(self._emitted)
        if text.endswith(last) and len(last) >= num_held:
            self._pending, self._emitted = kept, last[: len(last) - num_held]
        elif not num_held:
            self._pending, self._emitted = [], ""

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
    """Finds the stop string that is completed first in a stream of text, however it is cut into pieces.

    Of several that are completed by the same character the longest counts.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._stops = list(stops)
        self._include_stop = include_stop
        self._held = ""
        self._num_barred = 0  # characters of the held text within which no stop string may end

    def push(self, text: str, may_stop: bool = True) -> StopMatch:
        """Text that cannot be part of a stop string any more; the rest is held back.

        Args:
            may_stop: False for text within which no stop string may end; one may begin there.
        """
        if not self._stops:
            return StopMatch(text)
        self._held += text
        if not may_stop:
            self._num_barred = len(self._held)
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._find(stop)) >= 0]
        if ends:
            end, at, stop = min(ends)
            shown = self._held[: end if self._include_stop else at]
            self._held = ""
            return StopMatch(shown, stop)
        num_shown = len(self._held) - max(self._overlap(stop) for stop in self._stops)
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        self._num_barred = max(0, self._num_barred - num_shown)
        return StopMatch(shown)

    def completes(self, text: str) -> bool:
        """Whether text that is pushed next would complete a stop string."""
        held = self._held + text
        return any(stop in held for stop in self._stops)

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._num_barred - len(stop) + 1))

    def flush(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if stop.startswith(self._held[-size:])), 0)
