"""The index says what a search of the whole window says, however the text came and whatever room there was."""

import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.core.ngram import MAX_NGRAM, MIN_NGRAM, WINDOW, IndexingRoom, NgramDraft, NgramIndex

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


@settings(max_examples=400)
@given(parts=st.lists(st.tuples(TEXT, st.integers(0, 30)), max_size=8), window=st.integers(6, 60))
def test_slices_lead_to_the_same_index_and_what_they_propose_meanwhile_did_follow(parts, window):
    index, text = NgramIndex(window), []
    for part, room in parts:
        index.extend(part)
        text += part
        index.catch_up(IndexingRoom(room))
        draft, best = index.propose(4), search(text[-window:], text[-window:], 4)
        assert draft.match_len <= best.match_len
        seen, size = text[-window:], draft.match_len
        ends = range(size, len(seen))
        assert not size or any(seen[e - size : e] == seen[-size:] and seen[e : e + 4] == draft.tokens for e in ends)
    for _ in range(window + 1):
        index.catch_up(IndexingRoom(1))
    assert index.propose(4) == search(text[-window:], text[-window:], 4)


def test_a_long_text_takes_no_more_room_at_once_than_there_is_and_the_newest_is_found_first():
    text = [7, 8, 9, 5, *range(100, 5100), 7, 8, 9, 6, *range(6000, 6050), 7, 8, 9]
    room = IndexingRoom(100)
    index = NgramIndex()
    index.extend(text)
    index.catch_up(room)
    assert room.left == 0
    assert index.propose(1) == NgramDraft([6], match_len=3)
    index = index_of([*text[:5004], 7, 8, 9], room=100)
    assert index.propose(1) == NgramDraft([], match_len=0)
    index.catch_up(IndexingRoom(ENDLESS))
    assert index.propose(1) == NgramDraft([5], match_len=3)


def test_the_new_tokens_of_a_step_are_indexed_when_there_is_no_room_for_old_ones():
    index = index_of(list(range(5000)), room=0)
    for token in (1, 2, 3, 9, 1, 2):
        index.extend([token])
        index.catch_up(IndexingRoom(0))
    assert index.propose(2) == NgramDraft([3, 9], match_len=2)


def test_memory_is_flat_once_the_window_is_full():
    def entries(index: NgramIndex) -> int:
        return sum(len(followers) for followers in index._followers.values()) + len(index._tokens)

    index = index_of(list(range(3 * WINDOW)))
    full = entries(index)
    assert full < 6 * WINDOW
    for start in range(3 * WINDOW, 8 * WINDOW, 50):
        index.extend(range(start, start + 50))
        index.catch_up(IndexingRoom(2048))
        assert entries(index) <= full + WINDOW
    assert sys.getsizeof(index._tokens) < 40 * WINDOW
