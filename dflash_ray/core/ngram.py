"""Prompt lookup: the tokens that followed the latest earlier occurrence of the sequence's last n-gram.

Source of the idea: Saxena, Prompt Lookup Decoding (2023). Needs no weights and no context features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_NGRAM = 5
MIN_NGRAM = 2
WINDOW = 8192  # tokens that are looked through, the last ones
_SIZES = range(MIN_NGRAM, MAX_NGRAM + 1)
_TOKEN_BITS = 32
_MOST_NEW = 64  # tokens that may have come since the last look without starting again; no step yields as many


@dataclass(frozen=True, slots=True)
class NgramDraft:
    """Tokens that may come next, and how many of the last tokens occurred before them; none and 0 where all is new."""

    tokens: list[int]
    match_len: int


@dataclass(slots=True)
class IndexingRoom:
    """How many tokens may still be indexed now, by all who share it; a microsecond or two each."""

    left: int


class NgramIndex:
    """Latest positions of every n-gram in the last `window` tokens of one growing sequence.

    Long texts are indexed in slices, the newest tokens first: until all are, older occurrences are not found. A lookup
    takes time independent of the length, and memory stays flat once the window is full.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._tokens: list[int] = []  # the window, and up to as many before it
        self._first = 0  # position of self._tokens[0] in the sequence
        # By size: tokens packed into one integer -> position of the token after the latest occurrence.
        self._followers: dict[int, dict[int, int]] = {size: {} for size in _SIZES}
        self._low = 0  # followers in [low, high) are indexed
        self._high = 0
        self._start = 0  # where the window starts

    def __len__(self) -> int:
        """Tokens of the sequence, those before the window included."""
        return self._first + len(self._tokens)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Appends committed tokens; `catch_up` indexes them."""
        self._tokens.extend(token_ids)

    def catch_up(self, room: IndexingRoom) -> None:
        """Indexes a step's new tokens in any case, and the text before as far as there is room, backwards."""
        end = len(self)
        start = max(0, end - self._window)
        if end - self._high > _MOST_NEW or self._high < start:
            self._forget(start, end)
        self._move_window(start)
        self._index(range(self._high, end), is_newest=True)
        low = max(self._start, self._low - max(0, room.left))
        self._index(range(self._low - 1, low - 1, -1), is_newest=False)
        room.left -= end - self._high + self._low - low
        self._low, self._high = low, end

    def propose(self, num_draft_tokens: int) -> NgramDraft:
        """At most `num_draft_tokens` tokens after the longest match in what is indexed."""
        return self._follow(self._tokens[-MAX_NGRAM:], num_draft_tokens)

    def propose_after(self, token_id: int, num_draft_tokens: int) -> NgramDraft:
        """As `propose`, for the sequence with one more token that is not appended."""
        return self._follow([*self._tokens[-(MAX_NGRAM - 1) :], token_id], num_draft_tokens)

    def _follow(self, suffix: list[int], num_draft_tokens: int) -> NgramDraft:
        for size in range(len(suffix), MIN_NGRAM - 1, -1):
            follower = self._followers[size].get(_packed(suffix[-size:]))
            if follower is not None:
                at = follower - self._first
                return NgramDraft(self._tokens[at : at + num_draft_tokens], size)
        return NgramDraft([], 0)

    def _index(self, positions: range, is_newest: bool) -> None:
        """Enters the n-grams that end just before each position; where they are known the newest occurrence counts."""
        tokens, first, start = self._tokens, self._first, self._start
        sizes = list(self._followers.items())
        for position in positions:
            at = position - first
            key = tokens[at - 1]
            shift = 0
            for size, followers in sizes:
                if position - size < start:
                    break
                shift += _TOKEN_BITS
                key |= tokens[at - size] << shift
                if is_newest:
                    followers[key] = position
                else:
                    followers.setdefault(key, position)

    def _move_window(self, start: int) -> None:
        """Drops the n-grams that begin before `start`, unless they occur again after it."""
        for position in range(self._start, start):
            at = position - self._first
            for size, followers in self._followers.items():
                key = _packed(self._tokens[at : at + size])
                if followers.get(key) == position + size:
                    del followers[key]
        self._start = start
        self._low = max(self._low, start)
        if start - self._first >= self._window:
            del self._tokens[: start - self._first]
            self._first = start

    def _forget(self, start: int, end: int) -> None:
        for followers in self._followers.values():
            followers.clear()
        self._low = self._high = end
        self._start = start


def _packed(ngram: Sequence[int]) -> int:
    """An n-gram as one integer, its last token in the lowest bits."""
    key = 0
    for token in ngram:
        key = key << _TOKEN_BITS | token
    return key
