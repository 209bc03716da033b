"""How ranks that hold parts of the vocabulary tell each other a few numbers a row."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class RankGroup(Protocol):
    """The ranks that share a row of logits."""

    size: int

    def all_gather(self, values: Tensor) -> Tensor:
        """Every rank's values, [size, *values.shape], the same on all ranks."""


class SingleRank:
    """One rank holds the whole vocabulary."""

    size = 1

    def all_gather(self, values: Tensor) -> Tensor:
        return values[None]


class ProcessGroupRanks:
    """Ranks of a torch.distributed process group."""

    def __init__(self, process_group: Any, size: int) -> None:
        self._group = process_group
        self.size = size

    def all_gather(self, values: Tensor) -> Tensor:
        # Flat, because gloo takes no output with a dimension more than the input.
        gathered = torch.empty(self.size * values.numel(), dtype=values.dtype, device=values.device)
        torch.distributed.all_gather_into_tensor(gathered, values.contiguous().view(-1), group=self._group)
        return gathered.view(self.size, *values.shape)
