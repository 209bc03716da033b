"""Prompt lookup: the tokens that followed the latest earlier occurrence of a sequence's last n-gram.

Source of the idea: Saxena, Prompt Lookup Decoding (2023). Needs no weights and no context features.

A follower is the position after an n-gram; it stands for the n-grams of all sizes that end just before it. For each
size and row, `heads` has the latest follower by the n-gram's hash, and `earlier` the one before each of the same hash;
a lookup goes down that chain until the tokens are the same. Everything is done for many rows and tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dflash_ray.core.arrays import Flags, Ints, Tokens, spans

MAX_NGRAM = 5
MIN_NGRAM = 2
WINDOW = 8192  # tokens that are looked through, the last ones
_SIZES = np.arange(MIN_NGRAM, MAX_NGRAM + 1)
_NUM_SIZES = 4  # a power of two: positions and sizes are told apart by shifts
_SIZE_BITS = 2
_POSITION_BITS = 28
_MOST_NEW = 64  # tokens that may have come since the last look without starting again; no step yields as many
_MIN_BUCKET_BITS = 6
_SHARED = -1
_MULTIPLIER = np.uint32(0x9E3779B1)
Positions = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
_BACK = np.arange(1, MAX_NGRAM + 1)  # the tokens before a follower, the last one first


@dataclass(frozen=True, slots=True)
class NgramDraft:
    """Tokens that may come next, and how many of the last tokens occurred before them; none and 0 where all is new."""

    tokens: list[int]
    match_len: int


@dataclass(slots=True)
class IndexingRoom:
    """How many tokens of long texts may still be indexed now, by all who share it; a quarter of a microsecond each."""

    left: int


class NgramTable:
    """Every n-gram in the last `window` tokens of many growing sequences, one a row.

    A text is indexed when it is first looked at, whole, where there is room; until then nothing is found in it. Memory
    is flat once the window is full.
    """

    def __init__(self, tokens: Tokens, window: int = WINDOW) -> None:
        """`tokens` [num_rows, capacity] is its owner's, who appends to rows, and clears a row that starts anew."""
        num_rows, self._capacity = tokens.shape
        assert self._capacity < 1 << _POSITION_BITS
        self._tokens = tokens.reshape(-1)
        self._window = window
        self._ring_bits = (min(window, self._capacity) - 1).bit_length()
        self._bucket_bits = max(_MIN_BUCKET_BITS, self._ring_bits)
        self._heads = np.zeros((num_rows * _NUM_SIZES << self._bucket_bits) + 1, np.int32)  # the last is of no n-gram
        self._earlier = np.zeros((num_rows << self._ring_bits, _NUM_SIZES), np.int32)
        self._high = np.zeros(num_rows, np.int64)  # followers below are indexed; 0: the row is not
        self._row_bits = np.zeros(num_rows, np.uint32)  # of the buckets that a row uses
        self._outgrown_at = np.zeros(num_rows, np.int64)  # tokens beyond which it is to use more
        self._first_heads = (np.arange(_NUM_SIZES) << self._bucket_bits)[:, None]  # of each size, in a row

    def clear(self, row: int) -> None:
        """The row's tokens are another sequence's now."""
        self._high[row] = 0

    def catch_up(self, rows: Ints, lens: Ints, room: IndexingRoom) -> None:
        """Indexes a step's new tokens of rows with `lens` tokens, and whole texts as far as there is room."""
        starts = self._high[rows]
        if self._window <= _MOST_NEW:
            starts = np.where(starts > 0, np.maximum(starts, lens - self._window), 0)
        counts, at = lens - starts, rows
        is_whole = (starts == 0) | (counts > _MOST_NEW) | (lens > self._outgrown_at[rows])
        if np.count_nonzero(is_whole):
            old = ~is_whole
            starts, counts, at = starts[old], counts[old], rows[old]
            self._high[at] = lens[old]
            wholes = []
            for row, length in zip(rows[is_whole].tolist(), lens[is_whole].tolist(), strict=True):
                if room.left <= 0 and length > _MOST_NEW:
                    self._high[row] = 0
                    continue
                start = max(0, length - self._window)
                room.left -= length - start
                self._start_row(row, length - start)
                wholes.append((row, start + MIN_NGRAM, max(0, length - start - MIN_NGRAM)))
                self._high[row] = length
            if wholes:
                more = np.array(wholes, np.int64)
                at, starts, counts = (np.concatenate(pair) for pair in zip((at, starts, counts), more.T, strict=True))
        else:
            self._high[rows] = lens
        followers = spans(starts, counts)
        if len(followers):
            self._enter(np.repeat(at, counts), followers)

    def _start_row(self, row: int, length: int) -> None:
        bits = min(self._bucket_bits, max(_MIN_BUCKET_BITS, (length - 1).bit_length()))
        self._row_bits[row] = bits
        self._outgrown_at[row] = 2 << bits if bits < self._bucket_bits else self._capacity
        for size in range(_NUM_SIZES):
            first = row * _NUM_SIZES + size << self._bucket_bits
            self._heads[first : first + (1 << bits)] = 0

    def _enter(self, rows: Ints, followers: Ints) -> None:
        """Indexes followers, those of a row in rising order."""
        before_them = self._tokens[rows * self._capacity + followers - _BACK[:, None]]
        hashed = before_them[0] * _MULTIPLIER
        hashes = before_them[1:]
        for of_size in hashes:
            hashed ^= of_size
            hashed *= _MULTIPLIER
            of_size[:] = hashed
        heads = (rows << self._bucket_bits + _SIZE_BITS) + self._first_heads + (hashes >> 32 - self._row_bits[rows])
        if followers.min() < MAX_NGRAM:
            heads[followers < _SIZES[:, None]] = len(self._heads) - 1  # the text begins within these n-grams
        position = followers.astype(np.int32)
        before = self._heads[heads]
        self._heads[heads] = position
        is_lost = self._heads[heads] != position
        if np.count_nonzero(is_lost):
            self._chain_shared(heads, is_lost, before, position)
        self._earlier[(rows << self._ring_bits) + (followers & ((1 << self._ring_bits) - 1))] = before.T

    def _chain_shared(self, heads: Ints, is_lost: Flags, before: Positions, position: Positions) -> None:
        """Puts right the heads that several of the followers at `position` have; all but the last of them are lost."""
        self._heads[heads[is_lost]] = _SHARED
        is_shared = self._heads[heads] == _SHARED
        its_heads, its_position = heads[is_shared], np.broadcast_to(position, heads.shape)[is_shared]
        its_before = before[is_shared]
        order = np.argsort((its_heads << _POSITION_BITS) + its_position)
        sorted_heads, sorted_position = its_heads[order], its_position[order]
        is_later = sorted_heads[1:] == sorted_heads[:-1]
        its_before[order[1:][is_later]] = sorted_position[:-1][is_later]
        before[is_shared] = its_before
        is_last = np.append(~is_later, True)
        self._heads[sorted_heads[is_last]] = sorted_position[is_last]

    def propose(self, rows: Ints, lens: Ints, counts: Ints) -> tuple[Tokens, Ints, Ints]:
        """At most `counts` tokens after the longest match of each row's end in what is indexed, of its `lens` tokens.

        Returns drafts [num_rows, max(counts)], how many of them there are, and the lengths of the matches.
        """
        suffix = self._tokens[(rows * self._capacity + lens)[:, None] - _BACK]
        return self._follow(rows, lens, suffix, lens, counts)

    def propose_after(self, row: int, length: int, token_id: int, count: int) -> NgramDraft:
        """As `propose` for one row, with one more token that is not appended."""
        rows, lens, counts = (np.array([value]) for value in (row, length, count))
        suffix = self._tokens[(rows * self._capacity + lens)[:, None] - np.maximum(_BACK - 1, 1)]
        suffix[0, 0] = token_id
        drafts, draft_lens, match_lens = self._follow(rows, lens, suffix, lens + 1, counts)
        return NgramDraft(drafts[0, : draft_lens[0]].tolist(), int(match_lens[0]))

    def propose_behind(
        self, rows: Ints, lens: Ints, tokens: Tokens, parents: Ints, count: int
    ) -> tuple[Tokens, Ints, Ints]:
        """As `propose`, behind each row's end and behind each node of a tree [num_rows, k] that follows it.

        Args:
            parents: of the nodes' tokens; 0 is the row's end, j the j-th node.
            count: tokens behind each at most.

        Returns drafts [num_rows, 1 + k, at most count], and [num_rows, 1 + k] their numbers and lengths of matches.
        """
        nodes = np.pad(parents, ((0, 0), (1, 0)))
        at = np.broadcast_to(np.arange(nodes.shape[1]), nodes.shape)
        suffix = np.empty((*nodes.shape, MAX_NGRAM), np.uint32)
        last = (rows * self._capacity + lens - 1)[:, None]
        before = np.zeros_like(nodes)  # of the row's own tokens, those that are in the suffix
        for back in range(MAX_NGRAM):
            drafted = np.take_along_axis(tokens, np.maximum(at - 1, 0), axis=1)
            suffix[:, :, back] = np.where(at > 0, drafted, self._tokens[last - before])
            before += at == 0
            at = np.take_along_axis(nodes, at, axis=1)
        size = nodes.shape[1]
        suffix_lens = (lens[:, None] + MAX_NGRAM - before).reshape(-1)
        drafts, draft_lens, match_lens = self._follow(
            np.repeat(rows, size),
            np.repeat(lens, size),
            suffix.reshape(-1, MAX_NGRAM),
            suffix_lens,
            np.full(nodes.size, count),
        )
        return drafts.reshape(*nodes.shape, -1), draft_lens.reshape(nodes.shape), match_lens.reshape(nodes.shape)

    def _follow(
        self, rows: Ints, lens: Ints, suffix: Tokens, suffix_lens: Ints, counts: Ints
    ) -> tuple[Tokens, Ints, Ints]:
        """`suffix` [num_rows, MAX_NGRAM] has the last tokens, the very last first."""
        match_lens, at = np.zeros_like(lens), np.zeros_like(lens)
        left = ((self._high[rows] == lens) & (suffix_lens >= MIN_NGRAM)).nonzero()[0]
        hashed = suffix[left, 0] * _MULTIPLIER
        for size in range(MIN_NGRAM, MAX_NGRAM + 1):  # what has no match of a size has none of a larger one
            hashed = (hashed ^ suffix[left, size - 1]) * _MULTIPLIER
            found = self._find(rows[left], size, hashed, suffix[left, :size], lens[left])
            is_found = (found > 0) & (suffix_lens[left] >= size)
            left, hashed = left[is_found], hashed[is_found]
            if not len(left):
                break
            at[left], match_lens[left] = found[is_found], size
        if not np.count_nonzero(match_lens):
            return np.zeros((len(rows), 0), np.uint32), at, match_lens
        draft_lens = np.where(match_lens > 0, np.minimum(counts, lens - at), 0)
        ahead = np.arange(int(draft_lens.max(initial=0)))
        drafts = self._tokens[np.minimum((rows * self._capacity + at)[:, None] + ahead, len(self._tokens) - 1)]
        return drafts, draft_lens, match_lens

    def _find(self, rows: Ints, size: int, hashed: Tokens, ngrams: Tokens, lens: Ints) -> Ints:
        """The latest follower of each row's n-gram [size], the last token first; 0 where there is none."""
        heads = (rows << self._bucket_bits + _SIZE_BITS) + (size - MIN_NGRAM << self._bucket_bits)
        position = self._heads[heads + (hashed >> (32 - self._row_bits[rows]))].astype(np.int64)
        lowest = np.maximum(lens - self._window, 0) + size
        found: Ints = np.zeros_like(position)
        left = (position >= lowest).nonzero()[0]
        while len(left):
            at, row = position[left], rows[left]
            is_same = (self._tokens[(row * self._capacity + at)[:, None] - _BACK[:size]] == ngrams[left]).all(axis=1)
            found[left[is_same]] = at[is_same]
            in_ring = (row << self._ring_bits) + (at & ((1 << self._ring_bits) - 1))
            position[left] = self._earlier[in_ring, size - MIN_NGRAM]
            left = left[~is_same & (position[left] >= lowest[left])]
        return found


class NgramIndex:
    """The n-grams of one sequence, which is kept here; of a long one no more than two windows."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._tokens: Tokens = np.zeros((1, 2 * window), np.uint32)
        self._table = NgramTable(self._tokens, window)
        self._length = 0  # tokens of the sequence in self._tokens
        self._num_dropped = 0  # before them

    def __len__(self) -> int:
        """Tokens of the sequence, those that are not kept included."""
        return self._num_dropped + self._length

    def extend(self, token_ids: Sequence[int]) -> None:
        """Appends committed tokens; `catch_up` indexes them."""
        kept = token_ids[-self._window :]
        if self._length + len(token_ids) > 2 * self._window:
            old = self._tokens[0, : self._length][-(self._window - len(kept)) :] if len(kept) < self._window else ()
            self._num_dropped += self._length + len(token_ids) - len(old) - len(kept)
            self._tokens[0, : len(old)] = old
            self._length = len(old)
            self._table.clear(0)
        else:
            kept = token_ids
        self._tokens[0, self._length : self._length + len(kept)] = kept
        self._length += len(kept)

    def catch_up(self, room: IndexingRoom) -> None:
        """Indexes a step's new tokens in any case, and a long text when there is room."""
        self._table.catch_up(np.zeros(1, np.int64), np.array([self._length]), room)

    def propose(self, num_draft_tokens: int) -> NgramDraft:
        """At most `num_draft_tokens` tokens after the longest match in what is indexed."""
        rows = np.zeros(1, np.int64)
        drafts, lens, matches = self._table.propose(rows, np.array([self._length]), np.array([num_draft_tokens]))
        return NgramDraft(drafts[0, : lens[0]].tolist(), int(matches[0]))

    def propose_after(self, token_id: int, num_draft_tokens: int) -> NgramDraft:
        """As `propose`, for the sequence with one more token that is not appended."""
        return self._table.propose_after(0, self._length, token_id, num_draft_tokens)
