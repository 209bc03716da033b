"""Attention over the paged cache, as a transformers attention implementation.

`transformers` calls `paged_attention` in every layer with rotated queries and keys of all rows of a step; the step's
layout comes along as the keyword argument `paged`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from dflash_ray.target.batch import StepBatch
from dflash_ray.target.paged_cache import PagedCache, cache_rows

IMPLEMENTATION = "ragged_paged"  # transformers takes a name with "flash" in it for its own flash attention


@dataclass(frozen=True)
class _Entry:
    start: int  # first row of the entry in the step
    length: int
    rows: Tensor | slice  # of the cache: context and the entry's own
    context_len: int


class PagedStep:
    """One step's layout, shared by all layers."""

    def __init__(self, batch: StepBatch, cache: PagedCache, device: str) -> None:
        self.cache = cache
        self.slots = torch.from_numpy(batch.slots).to(device)
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self.entries = []
        start = page = 0
        for length, context_len, count in zip(batch.entry_lens, batch.context_lens, batch.page_counts, strict=True):
            pages = batch.pages[page : page + count].tolist()
            rows = cache_rows(pages, int(context_len + length), cache.page_size)
            self.entries.append(_Entry(start, int(length), rows, int(context_len)))
            start, page = start + int(length), page + int(count)

    def mask(self, entry: _Entry, window: int | None, like: Tensor) -> Tensor | None:
        """Additive mask [rows, context + rows], or None where every row sees everything."""
        total = entry.context_len + entry.length
        if entry.length == 1 and (window is None or total <= window):
            return None
        key = (entry.length, entry.context_len, window)
        if key not in self._masks:
            query = torch.arange(entry.context_len, total, device=like.device)[:, None]
            keys = torch.arange(total, device=like.device)[None]
            is_hidden = keys > query
            if window is not None:
                is_hidden |= query - keys >= window
            mask = torch.zeros(is_hidden.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(is_hidden, float("-inf"))
        return self._masks[key]


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
    """Writes the step's keys and values, then attends entry by entry.

    query [1, n_q, T, d], key and value [1, n_kv, T, d]; returns [1, T, n_q, d] and no weights.
    """
    assert paged is not None
    layer = module.layer_idx
    paged.cache.write(layer, paged.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    num_heads, num_rows, head_dim = query.shape[1:]
    num_kv_heads = key.shape[1]
    scale = head_dim**-0.5 if scaling is None else scaling
    out = query.new_empty(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    grouped = (query[0] * scale).unflatten(0, (num_kv_heads, -1))  # [n_kv, n_q / n_kv, T, d]
    for entry in paged.entries:
        keys, values = paged.cache.read(layer, entry.rows)
        stop = entry.start + entry.length
        # Query heads that share a key head are rows of one product: nothing is repeated.
        queries = grouped[:, :, entry.start : stop].flatten(1, 2)
        scores = torch.bmm(queries, keys.permute(1, 2, 0))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        mask = paged.mask(entry, sliding_window, scores)
        if mask is not None:
            scores = (scores.unflatten(1, (-1, entry.length)) + mask).flatten(1, 2)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        attended = torch.bmm(weights, values.transpose(0, 1)).unflatten(1, (-1, entry.length))
        out[entry.start : stop] = attended.permute(2, 0, 1, 3)
    return out.flatten(1, 2)[None], None


def register() -> None:
    """Makes the implementation known to transformers; masks are made here, not by the model."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
