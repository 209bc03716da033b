"""How ranks that hold parts of the vocabulary tell each other a few numbers a row."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class ShardGroup(Protocol):
    """The ranks that share a row of logits."""

    size: int

    def all_gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every rank's values, [size, *values.shape], the same on all ranks."""


class SingleShard:
    """One rank holds the whole vocabulary."""

    size = 1

    def all_gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values[None]


class ProcessGroupShards:
    """Ranks of a torch.distributed process group."""

    def __init__(self, process_group: Any, size: int, device: torch.device) -> None:
        self._group = process_group
        self.size = size
        self._device = device

    def all_gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        mine = torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(gathered, mine, group=self._group)
        return torch.stack(gathered).cpu().numpy()
