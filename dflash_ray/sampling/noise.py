"""Position-keyed randomness: Philox4x32-10 (Salmon et al. 2011) with the request's seed as key.

counter = (position low, position high, token_id // 4, purpose), word = token_id % 4. A draw depends on nothing else, so
batches, draft lengths, ranks and failovers cannot change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_ray.kernels import verify_ops
from dflash_ray.kernels.columns import Purpose

MAX_GUMBEL = 17.33  # -log(-log(1 - 2**-25)), the largest value of a 24-bit uniform, rounded up


def gumbel(seeds: list[int], positions: list[int], token_ids: Tensor, purpose: Purpose = Purpose.TARGET) -> Tensor:
    """Standard Gumbel noise, float64 [N, K], for N (seed, position) pairs and token ids int64 [N, K].

    At most MAX_GUMBEL.
    """
    signed = [seed - (1 << 64) if seed >> 63 else seed for seed in seeds]
    device = token_ids.device
    return verify_ops.gumbel_noise(
        torch.tensor(signed, dtype=torch.int64, device=device),
        torch.tensor(positions, dtype=torch.int64, device=device),
        token_ids.contiguous(),
        int(purpose),
    )
