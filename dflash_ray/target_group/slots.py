"""Live sequences in slots: the committed tokens (the truth), pages, limits and sampling, in arrays that stay in place.

A sequence has a slot from its opening to its end. Its lines are written when it opens and grows; a step gathers what it
needs by slot. Every rank keeps the same table and is led through the same changes.

Regions of a sequence, by position:
    [0, kv_len)          computed: keys and values in the cache, features known
    kv_len ...           known but not computed: the rest of a prompt, or the anchor token alone when decoding
    committed_len        draft rows of the pass that runs; rolled back by leaving kv_len where it is
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core.arrays import are_ones, spans
from dflash_ray.models.dflash2 import Draw
from dflash_ray.sampling.parameters import NO_LOGPROBS, REJECTION
from dflash_ray.sampling.table import SamplingTable
from dflash_ray.target_group.step import Ids, Ints, Opening

NO_SLOT = -1
_FIRST_SLOTS = 64
_GROWING = (
    "kv_lens", "committed_lens", "base_lens", "prompt_lens", "page_counts", "cached_lens", "named_counts",
    "wants_features", "is_over",
)  # fmt: skip


class SlotTable:
    """N slots of sequences of at most L tokens.

    Attributes:
        slot_of: slots by sequence id.
        kv_lens, committed_lens, prompt_lens: [N].
        base_lens: [N] committed_lens before the last tokens were committed; 0 where none were.
        is_over: [N] the sequence has its last token.
        tokens: [N, L + 1] the committed ones; a sequence ends with the token that follows the L-th.
        pages: [N, L / page_size] the first `page_counts` of them; page_counts: [N].
        cached_lens: [N] rows that were found computed; named_counts: [N] pages that the prefix cache has looked at.
        wants_features: [N].
        num_prompt_logprobs: [N] likeliest tokens wanted beside each of the prompt's, or NO_LOGPROBS.
        sampling: the slots' sampling parameters and token counts.
    """

    def __init__(self, max_model_len: int, page_size: int, num_slots: int = _FIRST_SLOTS) -> None:
        self.max_model_len = max_model_len
        self.page_size = page_size
        self.slot_of: dict[int, int] = {}
        self.kv_lens = np.zeros(num_slots, dtype=np.int64)
        self.committed_lens = np.zeros(num_slots, dtype=np.int64)
        self.base_lens = np.zeros(num_slots, dtype=np.int64)
        self.is_over = np.zeros(num_slots, dtype=np.bool_)
        self.prompt_lens = np.zeros(num_slots, dtype=np.int64)
        self.tokens = np.zeros((num_slots, max_model_len + 1), dtype=np.int32)
        self.page_counts = np.zeros(num_slots, dtype=np.int64)
        self.cached_lens = np.zeros(num_slots, dtype=np.int64)
        self.named_counts = np.zeros(num_slots, dtype=np.int64)
        self.pages = np.zeros((num_slots, -(-max_model_len // page_size)), dtype=np.int64)
        self.wants_features = np.zeros(num_slots, dtype=np.bool_)
        self.num_prompt_logprobs = np.full(num_slots, NO_LOGPROBS, dtype=np.int64)
        self.sampling = SamplingTable(num_slots)
        self._free = list(range(num_slots))

    def __len__(self) -> int:
        return len(self.slot_of)

    def slots(self, sequence_ids: Ids) -> Ints:
        """The slots of sequences, NO_SLOT for unknown ones."""
        get = self.slot_of.get
        return np.array([get(sequence_id, NO_SLOT) for sequence_id in sequence_ids.tolist()], dtype=np.int64)

    def open(self, opening: Opening) -> int:
        """Gives a sequence that has none a slot, and returns it."""
        if not self._free:
            self._grow()
        slot = heapq.heappop(self._free)
        length = len(opening.token_ids)
        self.slot_of[opening.sequence_id] = slot
        self.kv_lens[slot] = self.page_counts[slot] = self.cached_lens[slot] = self.named_counts[slot] = 0
        self.committed_lens[slot], self.prompt_lens[slot] = length, opening.prompt_len
        self.base_lens[slot], self.is_over[slot] = 0, False
        self.tokens[slot, :length] = opening.token_ids
        self.wants_features[slot] = opening.wants_features
        self.num_prompt_logprobs[slot] = opening.sampling.num_prompt_logprobs
        self.sampling.open(
            slot,
            opening.sampling,
            opening.stop_ids,
            opening.prompt_len,
            opening.min_new_tokens,
            min(self.max_model_len, opening.prompt_len + opening.max_new_tokens),
            opening.token_ids,
        )
        return slot

    def close(self, sequence_id: int) -> list[int]:
        """Forgets a sequence and returns its pages: none for an unknown one."""
        slot = self.slot_of.pop(sequence_id, None)
        if slot is None:
            return []
        self.sampling.close(slot)
        heapq.heappush(self._free, slot)
        pages: list[int] = self.pages[slot, : self.page_counts[slot]].tolist()
        return pages

    def add_pages(self, slot: int, pages: list[int]) -> None:
        """More pages behind a slot's."""
        count = int(self.page_counts[slot])
        self.pages[slot, count : count + len(pages)] = pages
        self.page_counts[slot] += len(pages)

    def add_page(self, slots: Ints, pages: Ints) -> None:
        """One page more behind each of n slots'."""
        self.pages[slots, self.page_counts[slots]] = pages
        self.page_counts[slots] += 1

    def commit(self, slots: Ints, num_tokens: Ints, token_ids: Ints) -> None:
        """Appends tokens: `num_tokens` [n] for each of n slots, `token_ids` one slot after the other."""
        lens = self.committed_lens[slots]
        if are_ones(num_tokens, len(token_ids)):
            self.tokens[slots, lens], self.base_lens[slots] = token_ids, lens
        else:
            self.tokens[slots.repeat(num_tokens), spans(lens, num_tokens)] = token_ids
            self.base_lens[slots] = np.where(num_tokens > 0, lens, self.base_lens[slots])
        self.committed_lens[slots] = lens + num_tokens
        self.sampling.commit(slots, num_tokens, token_ids)

    def cache_rows(self, slot_of: Ints, positions: Ints) -> Ints:
        """Rows of the cache, and of the feature store, of [n] positions of the sequences in [n] slots."""
        nth_page, in_page = np.divmod(positions, self.page_size)
        rows: Ints = self.pages[slot_of, nth_page] * self.page_size + in_page
        return rows

    def draws(self, slots: Iterable[int]) -> list[Draw]:
        """What a drafter may know of the draws of sequences."""
        params = (self.sampling.params[slot] for slot in slots)
        return [Draw(one.temperature, one.seed, one.mode == REJECTION) for one in params]

    def _grow(self) -> None:
        """Twice as many slots. Lines of tokens are copied as far as they are used: memory behind stays untouched."""
        count = len(self.kv_lens)
        for name in _GROWING:
            setattr(self, name, np.pad(getattr(self, name), (0, count)))
        self.num_prompt_logprobs = np.pad(self.num_prompt_logprobs, (0, count), constant_values=NO_LOGPROBS)
        self.tokens = _with_lines(self.tokens, 2 * count, self.committed_lens)
        self.pages = _with_lines(self.pages, 2 * count, self.page_counts)
        self.sampling.grow(2 * count)
        self._free = list(range(count, 2 * count))


def _with_lines(table: NDArray[Any], num_lines: int, used: Ints) -> NDArray[Any]:
    grown = np.zeros((num_lines, table.shape[1]), dtype=table.dtype)
    for line, count in enumerate(used[: len(table)].tolist()):
        grown[line, :count] = table[line, :count]
    return grown
