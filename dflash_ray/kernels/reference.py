"""Every operator in plain torch: short, slow and obviously right."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    entry_lens: Tensor,
    context_lens: Tensor,
    page_counts: Tensor,
    pages: Tensor,
    page_size: int,
    scale: float,
    window: int,
    softcap: float,
    is_causal: bool,
    parents: Tensor | None = None,
) -> Tensor:
    key_cache.index_copy_(0, slots, key)
    value_cache.index_copy_(0, slots, value)
    out = torch.empty_like(query)
    start = page = 0
    for length, context_len, count in zip(
        entry_lens.tolist(), context_lens.tolist(), page_counts.tolist(), strict=True
    ):
        rows = _cache_rows(pages[page : page + count].tolist(), context_len + length, page_size)
        if parents is None or not len(parents):
            mask = _mask(length, context_len, window, is_causal, query)
        else:
            mask = _tree_mask(parents[start : start + length].tolist(), context_len, window, query)
        out[start : start + length] = _attend(
            query[start : start + length], key_cache[rows], value_cache[rows], mask, scale, softcap
        )
        start, page = start + length, page + count
    return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """[T, n_q, d] over keys and values [S, n_kv, d]; query heads that share a key head are rows of one product."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    grouped = (query * scale).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    scores = torch.bmm(grouped, keys.permute(1, 2, 0))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = (scores.unflatten(1, (-1, num_rows)) + mask).flatten(1, 2)
    precision = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=precision).to(values.dtype)
    attended = torch.bmm(weights, values.transpose(0, 1)).unflatten(1, (-1, num_rows))
    return attended.permute(2, 0, 1, 3).reshape(num_rows, num_heads, head_dim)


def _mask(length: int, context_len: int, window: int, is_causal: bool, like: Tensor) -> Tensor | None:
    """Additive mask [T, S], or None where every row sees everything."""
    total = context_len + length
    if (length == 1 or not is_causal) and (not window or total <= window):
        return None
    distance = torch.arange(context_len, total, device=like.device)[:, None] - torch.arange(total, device=like.device)
    is_hidden = torch.zeros_like(distance, dtype=torch.bool)
    if is_causal:
        is_hidden |= distance < 0
    if window:
        is_hidden |= distance.abs() >= window
    mask = torch.zeros(is_hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(is_hidden, float("-inf"))


def _tree_mask(parents: list[int], context_len: int, window: int, like: Tensor) -> Tensor:
    """Additive mask [T, S] of a tree's rows, which see the context, their ancestors and themselves."""
    mask = torch.full((len(parents), context_len + len(parents)), float("-inf"), dtype=like.dtype, device=like.device)
    for row in range(len(parents)):
        path = [row]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        seen = [*range(context_len), *(context_len + at for at in path)]
        mask[row, seen[-window:]] = 0
    return mask


def move_rows(caches: list[Tensor], source: Tensor, target: Tensor) -> None:
    source, target = source.to(caches[0].device), target.to(caches[0].device)
    for cache in caches:
        cache.index_copy_(0, target, cache[source])


def _cache_rows(pages: list[int], length: int, page_size: int) -> Tensor | slice:
    """Where the first `length` rows of a page table lie: a slice when its pages follow each other."""
    first = pages[0]
    if all(page == first + i for i, page in enumerate(pages)):
        return slice(first * page_size, first * page_size + length)
    starts = torch.tensor(pages) * page_size
    return (starts[:, None] + torch.arange(page_size)).flatten()[:length]
