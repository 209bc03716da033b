"""Keys and values of all sequences on one rank, in pages of a fixed number of rows."""

from __future__ import annotations

import torch


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
        self.keys = [torch.zeros(rows, heads, head_dim, dtype=dtype, device=device) for heads in kv_heads]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
