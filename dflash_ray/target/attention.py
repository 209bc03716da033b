"""Attention over the paged cache, as a transformers attention implementation.

`transformers` calls `paged_attention` in every layer with rotated queries and keys of all rows of a step; the step's
layout comes along as the keyword argument `paged`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from dflash_ray.kernels import ops
from dflash_ray.target.batch import StepBatch
from dflash_ray.target.paged_cache import PagedCache

IMPLEMENTATION = "ragged_paged"  # transformers takes a name with "flash" in it for its own flash attention


class PagedStep:
    """One step's layout, shared by all layers: the slots on the model's device, the rest on the host."""

    def __init__(self, batch: StepBatch, cache: PagedCache, device: str) -> None:
        self.cache = cache
        self.slots = torch.from_numpy(batch.slots).to(device)
        tables = (batch.entry_lens, batch.context_lens, batch.page_counts, batch.pages)
        self.tables = tuple(torch.from_numpy(table) for table in tables)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    paged: PagedStep | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Writes the step's keys and values, then attends.

    query [1, n_q, T, d], key and value [1, n_kv, T, d]; returns [1, T, n_q, d] and no weights.
    """
    assert paged is not None
    cache, layer = paged.cache, module.layer_idx
    out = ops.paged_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cache.keys[layer],
        cache.values[layer],
        paged.slots,
        *paged.tables,
        page_size=cache.page_size,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
    )
    return out[None], None


def register() -> None:
    """Makes the implementation known to transformers; masks are made here, not by the model."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
