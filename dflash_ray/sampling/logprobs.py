"""Log-probabilities of tokens by the target's raw logits, before penalties, bias and temperature."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.kernels import verify_ops
from dflash_ray.sampling.ranks import RankGroup


@dataclass(slots=True)
class Logprobs:
    """Of Q tokens: their own [Q], and the likeliest tokens in their places [Q, n], best first."""

    chosen: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    top_ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    top_logprobs: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def part(self, start: int, stop: int, num_top: int) -> Logprobs:
        """Those of tokens start ... stop - 1 with at most `num_top` likeliest ones."""
        tops = (array[start:stop, :num_top] for array in (self.top_ids, self.top_logprobs))
        return Logprobs(self.chosen[start:stop], *tops)


@torch.inference_mode()
def token_logprobs(
    logits: Tensor, vocab_start: int, token_ids: NDArray[np.int64], num_top: int, group: RankGroup
) -> Logprobs:
    """Log-softmax of each row at its token. Collective; all ranks return the same.

    Args:
        logits: [Q, Vs] of this rank's tokens vocab_start ... vocab_start + Vs - 1.
        token_ids: [Q] tokens of the whole vocabulary.
    """
    mine = verify_ops.token_logprobs(logits, vocab_start, torch.from_numpy(token_ids).to(logits.device), num_top)
    shards = group.all_gather(mine).cpu()
    maximum = shards[:, :, 0].amax(0)
    log_sum = maximum + (shards[:, :, 1] * (shards[:, :, 0] - maximum).exp()).sum(0).log()
    # Shards come in ascending order of their tokens, so that a stable sort keeps the lowest token of equals first.
    values = shards[:, :, 3::2].transpose(0, 1).flatten(1)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :num_top]
    return Logprobs(
        (shards[:, :, 2].amax(0) - log_sum).numpy(),
        shards[:, :, 4::2].transpose(0, 1).flatten(1).gather(1, order).long().numpy(),
        (values.gather(1, order) - log_sum[:, None]).numpy(),
    )
