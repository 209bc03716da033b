"""Paged attention for devices without an operator of their own: entries of similar length in one padded product.

As `ops.paged_attention`, but what follows from a step's tables is made once for all layers, and nothing waits for the
device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Group:
    """E entries of at most N rows over at most S cached rows, all on the device.

    Attributes:
        rows: int64 [E, N], rows of the step; the entry's last row where it has fewer.
        cache_rows: int64 [E, S], any row behind an entry's end.
        positions: int64 [E, N]; totals: int64 [E], cached rows and own rows of each entry.
        places, step_rows: int64 [T], where the entries' rows lie in E * N and in the step.
    """

    rows: Tensor
    cache_rows: Tensor
    positions: Tensor
    totals: Tensor
    places: Tensor
    step_rows: Tensor

    def visible(self, window: int, is_causal: bool) -> Tensor:
        """Bool [E, N, S]; every row sees at least itself."""
        at = torch.arange(self.cache_rows.shape[1], device=self.cache_rows.device)
        positions = self.positions[..., None]
        seen = (at < self.totals[:, None, None]).expand(*self.positions.shape, -1)
        if is_causal:
            seen = seen & (at <= positions)
        if window:
            seen = seen & ((positions - at).abs() < window)
        return seen


class PaddedStep:
    """The layout of one step, for all of its layers.

    Args:
        entry_lens, context_lens, page_counts: int64 [E]; pages: int64, the entries' page tables in a row.
    """

    def __init__(
        self, entry_lens: Ints, context_lens: Ints, page_counts: Ints, pages: Ints, page_size: int, device: str
    ) -> None:
        sizes = 1 << np.ceil(np.log2(entry_lens)).astype(np.int64)
        firsts = np.cumsum(entry_lens) - entry_lens
        page_firsts = np.cumsum(page_counts) - page_counts
        self._groups = []
        for size in np.unique(sizes):
            members = np.flatnonzero(sizes == size)
            lens, contexts, counts = entry_lens[members], context_lens[members], page_counts[members]
            offsets = np.arange(lens.max())
            clamped = np.minimum(offsets, lens[:, None] - 1)
            rows = firsts[members, None] + clamped
            nth_page = np.minimum(np.arange(counts.max()), counts[:, None] - 1)
            places = np.flatnonzero(offsets < lens[:, None])
            tables, rows, positions, totals, places, step_rows = (
                torch.from_numpy(array).to(device, non_blocking=True)
                for array in (
                    pages[page_firsts[members, None] + nth_page],
                    rows,
                    contexts[:, None] + clamped,
                    contexts + lens,
                    places,
                    rows.flatten()[places],
                )
            )
            in_page = torch.arange(page_size, device=device)
            cache_rows = (tables[..., None] * page_size + in_page).flatten(1)
            self._groups.append(_Group(rows, cache_rows, positions, totals, places, step_rows))
        self._visible: dict[tuple[int, bool], list[Tensor]] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        is_causal: bool = True,
    ) -> Tensor:
        """Stores keys and values at the slots, then attends; shapes as in `ops.paged_attention`."""
        key_cache.index_copy_(0, slots, key)
        value_cache.index_copy_(0, slots, value)
        kind = (window, is_causal)
        if kind not in self._visible:
            self._visible[kind] = [group.visible(*kind) for group in self._groups]
        out = torch.empty_like(query)
        for group, visible in zip(self._groups, self._visible[kind], strict=True):
            attended = _attend(
                query[group.rows], key_cache[group.cache_rows], value_cache[group.cache_rows], visible, scale, softcap
            )
            out[group.step_rows] = attended.flatten(0, 1)[group.places]
        return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float) -> Tensor:
    """[E, N, n_q, d] over [E, S, n_kv, d]; query heads that share a key head are rows of one product."""
    num_rows, kv_heads = query.shape[1], keys.shape[2]
    grouped = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [E, n_kv, g, N, d]
    heads = grouped.shape[2]
    rows, k, v = grouped.flatten(2, 3), keys.transpose(1, 2), values.transpose(1, 2)
    mask = visible[:, None, None].expand(-1, 1, heads, -1, -1).flatten(2, 3)  # [E, 1, g * N, S]
    if softcap:
        scores = softcap * torch.tanh((rows @ k.transpose(-1, -2)).float() * (scale / softcap))
        attended = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1).to(v.dtype) @ v
    else:
        attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return attended.unflatten(2, (heads, num_rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)
