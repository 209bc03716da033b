"""Sampling parameters and token counts of live sequences, each in its slot, as the operators read them.

A slot's columns are written when its sequence opens, and its counts grow by the tokens that are committed. A step
gathers them by slot (`columns.py`) and makes nothing anew.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_ray.kernels import verify_ops
from dflash_ray.kernels.columns import FloatColumn, IntColumn
from dflash_ray.sampling.parameters import NO_LOGPROBS, REJECTION, SamplingParams

Ints = NDArray[np.int64]
_FIRST_WIDTH = 32
# Where each range of `ids` begins; its length is in the column behind.
RANGES = (IntColumn.HISTORY_AT, IntColumn.BIAS_AT, IntColumn.BANNED_AT, IntColumn.STOP_AT)


class Need(IntEnum):
    """Bits of what verifying a sequence takes beside an argmax. The last one is of its slot: tokens are counted."""

    DRAW = 1
    REJECTION = 2
    MIN_P = 4
    TOP_K = 8
    TOP_P = 16
    ADJUSTMENT = 32
    LOGPROBS = 64
    COUNTS = 128


_COUNTS = int(Need.COUNTS)


class SamplingTable:
    """Columns of N slots.

    Attributes:
        ints, floats: [N, 18] and [N, 6], one line a slot as in `kernels.columns`; what belongs to a step is 0.
        ids, values: [N, width], a slot's ranges one after the other: biases, stop tokens, and the history, which grows.
            Stop tokens are the banned ones, too. Places (`_AT`) are those of the flattened table.
        needs: [N] bits of `Need`.
        num_logprobs: [N] likeliest tokens wanted beside each token, or NO_LOGPROBS.
        params: [N] as they were given.
    """

    def __init__(self, num_slots: int) -> None:
        self.ints = np.zeros((num_slots, len(IntColumn)), dtype=np.int64)
        self.floats = np.zeros((num_slots, len(FloatColumn)), dtype=np.float32)
        self.ids = np.zeros((num_slots, _FIRST_WIDTH), dtype=np.int64)
        self.values = np.zeros((num_slots, _FIRST_WIDTH), dtype=np.float32)
        self.needs = np.zeros(num_slots, dtype=np.int64)
        self.num_logprobs = np.full(num_slots, NO_LOGPROBS, dtype=np.int64)
        self.params = [SamplingParams()] * num_slots
        self._longest = 0  # no slot has more ids
        self._uncounted: list[tuple[Ints, Ints, Ints]] = []

    def grow(self, num_slots: int) -> None:
        """Room for more slots; those in use stay as they are."""
        added = num_slots - len(self.needs)
        self.ints = np.pad(self.ints, ((0, added), (0, 0)))
        self.floats = np.pad(self.floats, ((0, added), (0, 0)))
        self.needs = np.pad(self.needs, (0, added))
        self.num_logprobs = np.pad(self.num_logprobs, (0, added), constant_values=NO_LOGPROBS)
        self.params += [SamplingParams()] * added
        self._reshape(num_slots, self.ids.shape[1])

    def open(
        self,
        slot: int,
        params: SamplingParams,
        stop_ids: Ints,
        prompt_len: int,
        min_new_tokens: int,
        max_len: int,
        token_ids: Ints,
    ) -> None:
        """Writes a slot.

        Args:
            stop_ids: end the sequence, and may not be drawn among its first `min_new_tokens`.
            max_len: length at which the sequence ends.
            token_ids: known so far; those from `prompt_len` on are counted.
        """
        counted, counts = _history(params, token_ids, prompt_len)
        fixed = len(params.bias_ids) + len(stop_ids)
        self._longest = max(self._longest, fixed + len(counted))
        self._widen()
        min_len = prompt_len + min_new_tokens
        bias_at = slot * self.ids.shape[1]
        stop_at, history_at = bias_at + len(params.bias_ids), bias_at + fixed
        num_banned = len(stop_ids) if min_new_tokens else 0
        self.ints[slot] = (
            params.seed - (1 << 64) if params.seed >> 63 else params.seed, params.mode, params.top_k, 0, 0, 0,
            min_len if min_new_tokens else 0, min_len, max_len, 0, history_at, len(counted),
            bias_at, len(params.bias_ids), stop_at, num_banned, stop_at, len(stop_ids),
        )  # fmt: skip
        self.floats[slot] = (
            0.0 if params.is_greedy else 1.0 / params.temperature,
            params.top_p,
            math.log(params.min_p) if params.min_p > 0 else -math.inf,
            params.presence_penalty, params.frequency_penalty, params.repetition_penalty,
        )  # fmt: skip
        ids, values = self.ids[slot], self.values[slot]
        ids[:fixed] = np.concatenate((params.bias_ids, stop_ids))
        values[: len(params.bias_ids)] = params.bias_values
        ids[fixed : fixed + len(counted)], values[fixed : fixed + len(counted)] = counted, counts
        self.needs[slot] = _needs(params, num_banned)
        self.num_logprobs[slot] = params.num_logprobs
        self.params[slot] = params

    def close(self, slot: int) -> None:
        """Empties a slot."""
        if self.needs[slot] & Need.COUNTS:
            self._uncounted = [_without(slot, *tokens) for tokens in self._uncounted]
        self.ints[slot] = 0
        self.needs[slot] = 0
        self.num_logprobs[slot] = NO_LOGPROBS
        self.params[slot] = SamplingParams()

    def commit(self, slots: Ints, num_tokens: Ints, token_ids: Ints) -> None:
        """Notes tokens where penalties need them: `num_tokens` [n] of each of n slots, one slot after the other.

        They are counted by `settle`, so that a result need not wait for it.
        """
        is_counted = (self.needs[slots] & _COUNTS) != 0
        num_counted = np.count_nonzero(is_counted)
        if num_counted == len(slots):
            self._uncounted.append((slots, num_tokens, token_ids))
        elif num_counted:
            of_token = np.repeat(is_counted, num_tokens)
            self._uncounted.append((slots[is_counted], num_tokens[is_counted], token_ids[of_token]))

    @property
    def is_settled(self) -> bool:
        """Whether all that was committed is counted."""
        return not self._uncounted

    def settle(self) -> None:
        """Counts what was committed; before that the columns lack it."""
        for slots, num_tokens, token_ids in self._uncounted:
            most = int(num_tokens.max(initial=0))
            self._longest += most
            if self._longest > self.ids.shape[1]:
                self._longest = int(self._used().max()) + most
                self._widen()
            tensors = (torch.from_numpy(a) for a in (self.ids, self.values, self.ints, slots, num_tokens, token_ids))
            verify_ops.count_history(*tensors)
        self._uncounted = []

    def _widen(self) -> None:
        """Room for as many ids as the longest slot has."""
        if self._longest > self.ids.shape[1]:
            self._reshape(len(self.ids), 1 << (self._longest - 1).bit_length())

    def _reshape(self, num_slots: int, width: int) -> None:
        """Another shape for `ids` and `values`. Memory that no range lies in is not touched."""
        ids, values = np.zeros((num_slots, width), dtype=np.int64), np.zeros((num_slots, width), dtype=np.float32)
        used = self._used()
        for slot in np.flatnonzero(used).tolist():
            ids[slot, : used[slot]] = self.ids[slot, : used[slot]]
            values[slot, : used[slot]] = self.values[slot, : used[slot]]
        moved = np.arange(len(self.ints)) * (width - self.ids.shape[1])
        self.ints[:, RANGES] += moved[:, None]
        self.ids, self.values = ids, values

    def _used(self) -> Ints:
        """[N] ids in each slot's ranges."""
        ends = self.ints[:, IntColumn.HISTORY_AT] + self.ints[:, IntColumn.HISTORY_LEN]
        used: Ints = (ends - np.arange(len(self.ints)) * self.ids.shape[1])[: len(self.ids)]
        return np.maximum(used, 0)


def _without(slot: int, slots: Ints, num_tokens: Ints, token_ids: Ints) -> tuple[Ints, Ints, Ints]:
    """Committed tokens but those of a slot."""
    stays = slots != slot
    return slots[stays], num_tokens[stays], token_ids[np.repeat(stays, num_tokens)]


def _history(params: SamplingParams, token_ids: Ints, prompt_len: int) -> tuple[Ints, NDArray[np.int64]]:
    """Tokens seen so far, ascending, and how often each is in the output: 0 for those of the prompt alone."""
    if not params.has_penalties:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    output, counts = np.unique(token_ids[prompt_len:], return_counts=True)
    if params.repetition_penalty == 1:  # the other penalties look at the output alone
        return output, counts
    seen = np.unique(token_ids)
    all_counts = np.zeros(len(seen), dtype=np.int64)
    all_counts[np.searchsorted(seen, output)] = counts
    return seen, all_counts


def _needs(params: SamplingParams, num_banned: int) -> int:
    is_drawn = not params.is_greedy
    wanted = {
        Need.DRAW: is_drawn,
        Need.REJECTION: is_drawn and params.mode == REJECTION,
        Need.MIN_P: is_drawn and params.min_p > 0,
        Need.TOP_K: is_drawn and params.top_k > 0,
        Need.TOP_P: is_drawn and params.top_p < 1,
        Need.ADJUSTMENT: params.has_penalties or len(params.bias_ids) > 0 or num_banned > 0,
        Need.LOGPROBS: params.num_logprobs != NO_LOGPROBS,
        Need.COUNTS: params.has_penalties,
    }
    return sum(need for need, is_wanted in wanted.items() if is_wanted)
