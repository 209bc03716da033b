"""Keys and values of all sequences on one rank, in pages of a fixed number of rows."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dflash_ray.kernels import ops
from dflash_ray.target_group.step import Ints


class PagedCache:
    """[num_pages * page_size, kv_heads, head_dim] for keys and values of every layer; the attention operator writes.

    Args:
        kv_heads: of this rank, for each layer.
    """

    def __init__(
        self, kv_heads: list[int], head_dim: int, num_pages: int, page_size: int, dtype: torch.dtype, device: str
    ) -> None:
        self.page_size = page_size
        rows = num_pages * page_size
        self.keys = [_zeros((rows, heads, head_dim), dtype, device) for heads in kv_heads]
        self.values = [_zeros((rows, heads, head_dim), dtype, device) for heads in kv_heads]

    def move(self, source: Ints, target: Ints) -> None:
        """Copies rows [n] to other rows in all layers, in this order: no target may be a source behind it."""
        ops.move_rows([*self.keys, *self.values], torch.from_numpy(source), torch.from_numpy(target))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeros that take memory on a CPU only where they are written: torch writes all, numpy leaves it to the kernel."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
