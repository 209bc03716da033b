"""Log-probabilities of tokens by the target's raw logits, before penalties, bias and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dflash_ray.kernels import verify_ops as ops
from dflash_ray.sampling.shards import ShardGroup


@dataclass(slots=True)
class Logprobs:
    """Of Q tokens: their own [Q], and the likeliest tokens in their places [Q][n], best first."""

    chosen: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)

    def extend(self, other: Logprobs) -> None:
        self.chosen += other.chosen
        self.top_ids += other.top_ids
        self.top_logprobs += other.top_logprobs

    def part(self, start: int, stop: int, num_top: int) -> Logprobs:
        """Those of tokens start ... stop - 1 with at most `num_top` likeliest ones."""
        return Logprobs(
            self.chosen[start:stop],
            [ids[:num_top] for ids in self.top_ids[start:stop]],
            [values[:num_top] for values in self.top_logprobs[start:stop]],
        )


@torch.inference_mode()
def token_logprobs(
    logits: Tensor, vocab_start: int, token_ids: Sequence[int], num_top: int, group: ShardGroup
) -> Logprobs:
    """Log-softmax of each row at its token. Collective; all ranks return the same.

    Args:
        logits: [Q, Vs] of this rank's tokens vocab_start ... vocab_start + Vs - 1.
        token_ids: Q tokens of the whole vocabulary.
    """
    mine = ops.token_logprobs(logits, vocab_start, torch.tensor(token_ids, device=logits.device), num_top)
    shards = group.all_gather(mine).cpu()
    maximum = shards[:, :, 0].amax(0)
    log_sum = maximum + (shards[:, :, 1] * (shards[:, :, 0] - maximum).exp()).sum(0).log()
    # Shards come in ascending order of their tokens, so that a stable sort keeps the lowest token of equals first.
    values = shards[:, :, 3::2].transpose(0, 1).flatten(1)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :num_top]
    return Logprobs(
        (shards[:, :, 2].amax(0) - log_sum).tolist(),
        shards[:, :, 4::2].transpose(0, 1).flatten(1).gather(1, order).long().tolist(),
        (values.gather(1, order) - log_sum[:, None]).tolist(),
    )
