"""Prompt lookup: the tokens that followed the latest earlier occurrence of the sequence's last n-gram.

Source of the idea: Saxena, Prompt Lookup Decoding (2023). Needs no weights and no context features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_NGRAM = 5
MIN_NGRAM = 2


@dataclass(frozen=True, slots=True)
class NgramDraft:
    """Tokens that may come next, and how many of the last tokens occurred before them; none and 0 where all is new."""

    tokens: list[int]
    match_len: int


class NgramIndex:
    """Latest positions of every n-gram of one growing sequence.

    Appending a token and proposing a draft both take time independent of the sequence's length.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its latest occurrence

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Appends committed tokens."""
        for token_id in token_ids:
            end = len(self._tokens)
            # Only n-grams that have a follower are indexed, so the last n-gram never finds itself.
            for size in range(MIN_NGRAM, MAX_NGRAM + 1):
                if end >= size:
                    self._followers[tuple(self._tokens[end - size : end])] = end
            self._tokens.append(token_id)

    def propose(self, num_draft_tokens: int) -> NgramDraft:
        """At most `num_draft_tokens` tokens after the longest match."""
        return self._follow(self._tokens[-MAX_NGRAM:], num_draft_tokens)

    def propose_after(self, token_id: int, num_draft_tokens: int) -> NgramDraft:
        """As `propose`, for the sequence with one more token that is not appended."""
        return self._follow([*self._tokens[-(MAX_NGRAM - 1) :], token_id], num_draft_tokens)

    def _follow(self, suffix: list[int], num_draft_tokens: int) -> NgramDraft:
        for size in range(len(suffix), MIN_NGRAM - 1, -1):
            follower = self._followers.get(tuple(suffix[-size:]))
            if follower is not None:
                return NgramDraft(self._tokens[follower : follower + num_draft_tokens], size)
        return NgramDraft([], 0)
