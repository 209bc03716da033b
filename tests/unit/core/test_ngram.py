"""The index says what a search of the whole window says, however the text came and whatever room there was."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.core.ngram import MAX_NGRAM, MIN_NGRAM, WINDOW, IndexingRoom, NgramDraft, NgramIndex, NgramTable

ENDLESS = 10**9
# Few distinct tokens, so that n-grams of all lengths repeat; and the largest that fit the wire.
TOKENS = st.sampled_from([0, 1, 2, 3, 2**32 - 1])
TEXT = st.lists(TOKENS, max_size=40)


def search(text: list[int], suffix: list[int], count: int) -> NgramDraft:
    """The longest end of `suffix` that occurs in `text` with a token after it; of equally long ones the latest."""
    for size in range(min(MAX_NGRAM, len(suffix)), MIN_NGRAM - 1, -1):
        for follower in range(len(text) - 1, size - 1, -1):
            if text[follower - size : follower] == suffix[-size:]:
                return NgramDraft(text[follower : follower + count], size)
    return NgramDraft([], 0)


def index_of(tokens: list[int], room: int = ENDLESS, window: int = WINDOW) -> NgramIndex:
    index = NgramIndex(window)
    index.extend(tokens)
    index.catch_up(IndexingRoom(room))
    return index


def test_what_followed_the_latest_occurrence_is_proposed():
    index = index_of([1, 2, 3, 9, 1, 2, 3, 8, 5, 1, 2])
    assert index.propose(3) == NgramDraft([3, 8, 5], match_len=2)
    assert index.propose_after(3, 2) == NgramDraft([8, 5], match_len=3)
    index.extend([77])
    index.catch_up(IndexingRoom(ENDLESS))
    assert index.propose(3) == NgramDraft([], match_len=0)


@settings(max_examples=400)
@given(parts=st.lists(TEXT, max_size=8), window=st.integers(6, 60), anchor=TOKENS, count=st.integers(1, 6))
def test_lookups_equal_a_search_of_the_window(parts, window, anchor, count):
    index, text = NgramIndex(window), []
    for part in parts:
        index.extend(part)
        text += part
        index.catch_up(IndexingRoom(ENDLESS))
        seen = text[-window:]
        assert index.propose(count) == search(seen, seen, count)
        assert index.propose_after(anchor, count) == search(seen, [*seen, anchor], count)
        assert len(index) == len(text)


@settings(max_examples=200)
@given(
    rounds=st.lists(st.lists(TEXT, min_size=3, max_size=3), max_size=6),
    window=st.integers(6, 60),
    counts=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    renewed=st.integers(0, 5),
)
def test_rows_of_a_table_are_looked_up_side_by_side_and_start_anew(rounds, window, counts, renewed):
    tokens = np.zeros((4, 300), np.uint32)
    table = NgramTable(tokens, window)
    texts = {0: [], 1: [], 3: []}
    rows = np.array(list(texts))
    for number, parts in enumerate(rounds):
        if number == renewed:
            texts[1] = []
            table.clear(1)
        for row, part in zip(texts, parts, strict=True):
            texts[row] += part
            tokens[row, : len(texts[row])] = texts[row]
        lens = np.array([len(text) for text in texts.values()])
        table.catch_up(rows, lens, IndexingRoom(ENDLESS))
        drafts, draft_lens, match_lens = table.propose(rows, lens, np.array(counts))
        for i, text in enumerate(texts.values()):
            seen = text[-window:]
            assert NgramDraft(drafts[i, : draft_lens[i]].tolist(), match_lens[i]) == search(seen, seen, counts[i])


def test_a_long_text_is_indexed_when_there_is_room_and_what_comes_meanwhile_with_it():
    index = NgramIndex()
    index.extend([7, 8, 9, 5, *range(100, 5100), 7, 8, 9])
    room = IndexingRoom(0)
    index.catch_up(room)
    assert index.propose(1) == NgramDraft([], match_len=0)
    index.extend([5, *range(100, 105)])
    index.catch_up(room)
    assert index.propose(1) == NgramDraft([], match_len=0)
    room.left = 1
    index.catch_up(room)
    assert index.propose(2) == NgramDraft([105, 106], match_len=5)
    assert room.left < -5000, "who comes next waits"


def test_memory_is_flat_and_the_latest_occurrence_is_found_once_the_window_is_full():
    def kept(index: NgramIndex) -> int:
        table = index._table
        return sum(array.nbytes for array in (index._tokens, table._heads, table._earlier))

    index = index_of(list(range(3 * WINDOW)))
    full = kept(index)
    for start in range(3 * WINDOW, 8 * WINDOW, 50):
        index.extend(range(start, start + 50))
        index.catch_up(IndexingRoom(1))
    assert kept(index) == full < 48 * WINDOW and len(index) >= 8 * WINDOW
    assert index.propose_after(7 * WINDOW, 1) == NgramDraft([], 0)
    index.extend([7 * WINDOW + 50, 7 * WINDOW + 51])
    index.catch_up(IndexingRoom(1))
    assert index.propose(1) == NgramDraft([7 * WINDOW + 52], 2)
