"""Keys and values of all sequences on one rank, in pages of a fixed number of rows."""

from __future__ import annotations

import torch
from torch import Tensor


class PagedCache:
    """[num_pages * page_size, kv_heads, head_dim] for keys and values of every layer.

    Args:
        kv_heads: of this rank, for each layer.
    """

    def __init__(
        self, kv_heads: list[int], head_dim: int, num_pages: int, page_size: int, dtype: torch.dtype, device: str
    ) -> None:
        self.page_size = page_size
        rows = num_pages * page_size
        self.keys = [torch.zeros(rows, heads, head_dim, dtype=dtype, device=device) for heads in kv_heads]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores rows [T, kv_heads, head_dim] at slots [T]."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def read(self, layer: int, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence's rows: views for a slice, copies for scattered rows."""
        return self.keys[layer][rows], self.values[layer][rows]


def cache_rows(pages: list[int], length: int, page_size: int) -> Tensor | slice:
    """Where the first `length` rows of a page table lie: a slice when its pages follow each other."""
    first = pages[0]
    if all(page == first + i for i, page in enumerate(pages)):
        return slice(first * page_size, first * page_size + length)
    starts = torch.tensor(pages) * page_size
    return (starts[:, None] + torch.arange(page_size)).flatten()[:length]
