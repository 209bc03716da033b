"""From logits to the target's law: penalties, bias and bans, temperature, min-p, top-k, top-p - in this order.

Rows are float32 shards [Vs] of the vocabulary. Nothing is sorted: min-p, top-k and top-p are one threshold on the
scaled logit, found by a radix select whose counts and masses are integers, so that the sum over ranks is exact and the
result does not depend on their number. Tokens that tie with the threshold are kept together.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dflash_ray.sampling.plan import SequencePlan
from dflash_ray.sampling.shards import ShardGroup

_MASS_BITS = (
    40  # fixed point of exp(x - max); sums over 2**12 ranks x 2**18 tokens stay below 2**63 in float64-exact steps
)
_RADIX_BITS = 8


def adjust_row(row: NDArray[np.float32], vocab_start: int, plan: SequencePlan, row_index: int, position: int) -> None:
    """Applies penalties, bias and bans in place to the row that draws the token of `position`."""
    if plan.has_penalties:
        _penalise(row, vocab_start, plan, row_index)
    for token_id, value in zip(plan.bias_ids, plan.bias_values, strict=True):
        if 0 <= token_id - vocab_start < len(row):
            row[token_id - vocab_start] += np.float32(value)
    if position < plan.ban_below:
        for token_id in plan.banned_ids:
            if 0 <= token_id - vocab_start < len(row):
                row[token_id - vocab_start] = -np.inf


def _penalise(row: NDArray[np.float32], vocab_start: int, plan: SequencePlan, row_index: int) -> None:
    counts = dict(zip(plan.history_ids, plan.history_counts, strict=True))
    for token_id in plan.ancestors(row_index):
        counts[token_id] = counts.get(token_id, 0) + 1
    ids = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts)) - vocab_start
    times = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
    inside = (ids >= 0) & (ids < len(row))
    ids, times = ids[inside], times[inside]
    values = row[ids]
    factor = np.float32(plan.repetition_penalty)
    values = np.where(values > 0, values / factor, values * factor)
    values -= np.float32(plan.frequency_penalty) * times
    values -= np.float32(plan.presence_penalty) * (times > 0)
    row[ids] = values


def threshold(row: NDArray[np.float32], row_max: float, plan: SequencePlan, group: ShardGroup) -> np.float32:
    """The lowest scaled logit that min-p, top-k and top-p keep; -inf keeps all.

    Collective: every rank calls it for the same rows in the same order.
    """
    floor = np.float32(-np.inf)
    if plan.min_p > 0:
        floor = np.float32(row_max + math.log(plan.min_p))
    if plan.top_k > 0:
        weights = (row >= floor).astype(np.int64)
        floor = max(floor, _select(row, weights, plan.top_k, group))
    if plan.top_p < 1:
        kept = np.where(row >= floor, row, np.float32(-np.inf)).astype(np.float64)
        mass = np.exp(kept - row_max)
        fixed = np.floor(mass * 2.0**_MASS_BITS).astype(np.int64)
        total = int(group.all_gather(np.array([fixed.sum()], dtype=np.float64)).sum())
        floor = max(floor, _select(row, fixed, max(1, math.ceil(plan.top_p * total)), group))
    return floor


def _select(row: NDArray[np.float32], weights: NDArray[np.int64], wanted: int, group: ShardGroup) -> np.float32:
    """The value at which the weights of the row, summed from the largest value down, first reach `wanted`."""
    keys = _ordered_keys(row)
    live = weights > 0
    keys, weights = keys[live], weights[live]
    prefix = 0
    for shift in range(32 - _RADIX_BITS, -1, -_RADIX_BITS):
        digits = (keys >> np.uint32(shift)) & np.uint32(2**_RADIX_BITS - 1)
        local = np.bincount(digits, weights=weights, minlength=2**_RADIX_BITS)
        reached = np.cumsum(group.all_gather(local).sum(0)[::-1])
        digit = int(np.searchsorted(reached, wanted))
        if digit >= 2**_RADIX_BITS:  # fewer than wanted in all: everything stays
            return np.float32(-np.inf)
        wanted -= int(reached[digit - 1]) if digit else 0
        digit = 2**_RADIX_BITS - 1 - digit
        prefix |= digit << shift
        same = digits == digit
        keys, weights = keys[same], weights[same]
    return _value_of_key(prefix)


def _ordered_keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Unsigned integers in the order of the floats."""
    bits = values.view(np.uint32)
    return np.where(bits >> np.uint32(31) == 1, ~bits, bits | np.uint32(0x80000000))


def _value_of_key(key: int) -> np.float32:
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return np.array([bits], dtype=np.uint32).view(np.float32)[0]
