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
from dflash_ray.kernels.padded import PaddedStep
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.paged_cache import PagedCache

IMPLEMENTATION = "ragged_paged"  # transformers takes a name with "flash" in it for its own flash attention


class PagedStep:
    """One step's layout, shared by all layers: the slots on the model's device, the tables as its attention reads them.

    Attributes:
        padded: the layout for devices other than the CPU, whose operator reads the tables on the host; else None.
    """

    def __init__(self, batch: StepBatch, cache: PagedCache, device: str, is_padded: bool | None = None) -> None:
        self.cache = cache
        self.slots = torch.from_numpy(batch.slots).to(device)
        tables = (batch.entry_lens, batch.context_lens, batch.page_counts, batch.pages, batch.parents)
        self.tables = tuple(map(torch.from_numpy, tables))
        is_padded = device != "cpu" if is_padded is None else is_padded
        self.padded = PaddedStep(*tables, cache.page_size, device) if is_padded else None

    def attend(self, layer: int, query: Tensor, scale: float, window: int, softcap: float) -> Tensor:
        """[T, n_q, d] of queries whose keys and values are in the layer's cache already; on devices but the CPU."""
        assert self.padded is not None
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return self.padded.attend_stored(query, keys, values, scale, window, softcap)


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
    rows = tuple(heads[0].transpose(0, 1) for heads in (query, key, value))
    stored = (cache.keys[layer], cache.values[layer], paged.slots)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = {"window": sliding_window or 0, "softcap": softcap or 0.0}
    if paged.padded is not None:
        out = paged.padded.attend(*rows, *stored, scale=scale, **kind)
    else:
        *tables, parents = paged.tables
        out = ops.paged_attention(
            *rows, *stored, *tables, page_size=cache.page_size, scale=scale, **kind, parents=parents
        )  # fmt: skip
    return out[None], None


def register() -> None:
    """Makes the implementation known to transformers; masks are made here, not by the model."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
