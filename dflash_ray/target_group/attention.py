"""Attention over the paged cache, as a transformers attention implementation.

`transformers` calls `paged_attention` in every layer with rotated queries and keys of all rows of a step; the step's
layout comes along as the keyword argument `paged`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from dflash_ray.kernels import attention
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.paged_cache import PagedCache

IMPLEMENTATION = "ragged_paged"  # transformers takes a name with "flash" in it for its own flash attention


class PagedStep:
    """One step's layout, shared by all layers: the slots on the model's device, the tables on the host."""

    def __init__(self, batch: StepBatch, cache: PagedCache, device: str) -> None:
        self.cache = cache
        self.slots = torch.from_numpy(batch.slots).to(device)
        self._tables = attention.StepTables(
            batch.entry_lens, batch.context_lens, batch.page_counts, batch.pages, batch.parents
        )
        self.tables = tuple(map(torch.from_numpy, self._tables))

    @cached_property
    def attention(self) -> attention.StepAttention:
        """The step as planned for its device; a decoder whose layers are one operator has no use for it."""
        return attention.plan(self._tables, self.slots, self.cache.page_size)


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
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = (scale, sliding_window or 0, softcap or 0.0)
    out = paged.attention.attend(q, k, v, cache.keys[layer], cache.values[layer], *kind)
    return out[None], None


def register() -> None:
    """Makes the implementation known to transformers; masks are made here, not by the model."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
