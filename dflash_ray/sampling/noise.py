"""Position-keyed randomness: Philox4x32-10 (Salmon et al. 2011) with the request's seed as key.

counter = (position low, position high, token_id // 4, purpose), word = token_id % 4. A draw depends on nothing else, so
batches, draft lengths, ranks and failovers cannot change it.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MASK = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_SHIFT = np.uint64(32)

MAX_GUMBEL = 17.33  # -log(-log(1 - 2**-25)), the largest value of a 24-bit uniform, rounded up


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes are independent."""

    TARGET = 0
    ACCEPT = 1
    RESIDUAL = 2


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Ten rounds over counters [4, n] (32-bit words in uint64); returns [4, n]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _MASK,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def uniform(seed: int, position: int, token_ids: NDArray[np.int64], purpose: Purpose) -> NDArray[np.float64]:
    """Open uniforms ((x >> 8) + 0.5) * 2**-24, one for each token id."""
    ids = token_ids.astype(np.uint64)
    counter = np.empty((4, len(ids)), dtype=np.uint64)
    counter[0], counter[1] = position & 0xFFFFFFFF, position >> 32
    counter[2], counter[3] = ids >> np.uint64(2), int(purpose)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    chosen = words[(ids & np.uint64(3)).astype(np.int64), np.arange(len(ids))]
    return ((chosen >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24


def gumbel(
    seed: int, position: int, token_ids: NDArray[np.int64], purpose: Purpose = Purpose.TARGET
) -> NDArray[np.float64]:
    """Standard Gumbel noise -log(-log(u)), float64, one value for each token id; at most MAX_GUMBEL."""
    return -np.log(-np.log(uniform(seed, position, token_ids, purpose)))
