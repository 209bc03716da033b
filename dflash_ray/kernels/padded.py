"""Paged attention in plain torch: entries of similar length in one padded product, for what no operator takes.

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

from dflash_ray.kernels.trees import depths_of, lineages

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Group:
    """E entries of at most N rows over at most S cached rows, all on the device.

    Attributes:
        rows: int64 [E, N], rows of the step; the entry's last row where it has fewer.
        cache_rows: int64 [E, S], any row behind an entry's end.
        positions: int64 [E, N]; totals: int64 [E], cached rows and own rows of each entry.
        contexts: int64 [E], cached rows of each entry.
        lineages: bool [E, N, N] in a tree, which own rows each row sees; None for chains.
        places, step_rows: int64 [T], where the entries' rows lie in E * N and in the step.
    """

    rows: Tensor
    cache_rows: Tensor
    positions: Tensor
    totals: Tensor
    contexts: Tensor
    lineages: Tensor | None
    places: Tensor
    step_rows: Tensor

    def visible(self, window: int, is_causal: bool) -> Tensor:
        """Bool [E, N, S]; every row sees at least itself."""
        at = torch.arange(self.cache_rows.shape[1], device=self.cache_rows.device)
        positions = self.positions[..., None]
        if self.lineages is not None:
            return self._visible_in_trees(at, positions, self.lineages, window)
        seen = (at < self.totals[:, None, None]).expand(*self.positions.shape, -1)
        if is_causal:
            seen = seen & (at <= positions)
        if window:
            seen = seen & ((positions - at).abs() < window)
        return seen

    def _visible_in_trees(self, at: Tensor, positions: Tensor, lineages: Tensor, window: int) -> Tensor:
        """The same where an entry's own rows lie behind its context in another order than that of their positions."""
        own = (at - self.contexts[:, None]).clamp(0, lineages.shape[1] - 1)  # [E, S] row of the entry, where it is one
        is_own = at >= self.contexts[:, None]
        follows = lineages.gather(2, own[:, None].expand(-1, lineages.shape[1], -1))
        seen = torch.where(is_own[:, None], follows & (at < self.totals[:, None])[:, None], True)
        if window:
            key_positions = torch.where(is_own, self.positions.gather(1, own), at)
            seen = seen & (positions - key_positions[:, None] < window)
        return seen


class PaddedStep:
    """The layout of one step, for all of its layers.

    Args:
        entry_lens, context_lens, page_counts: int64 [E]; pages: int64, the entries' page tables in a row.
        parents: int64 [T] as in `ops.paged_attention`; empty for chains.
        slots: int64 [T] on the device.
        is_chosen: bool [E], the entries that attend; None for all.
    """

    def __init__(
        self,
        entry_lens: Ints,
        context_lens: Ints,
        page_counts: Ints,
        pages: Ints,
        parents: Ints,
        slots: Tensor,
        page_size: int,
        is_chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        device, self._slots = slots.device, slots
        sizes = 1 << np.ceil(np.log2(entry_lens)).astype(np.int64)
        firsts = np.cumsum(entry_lens) - entry_lens
        page_firsts = np.cumsum(page_counts) - page_counts
        depths = depths_of(parents, np.repeat(firsts, entry_lens)) if len(parents) else None
        self._groups = []
        if is_chosen is not None:
            sizes = np.where(is_chosen, sizes, 0)
        for size in np.unique(sizes[sizes > 0]):
            members = np.flatnonzero(sizes == size)
            lens, contexts, counts = entry_lens[members], context_lens[members], page_counts[members]
            offsets = np.arange(lens.max())
            clamped = np.minimum(offsets, lens[:, None] - 1)
            rows = firsts[members, None] + clamped
            nth_page = np.minimum(np.arange(counts.max()), counts[:, None] - 1)
            places = np.flatnonzero(offsets < lens[:, None])
            own_positions, seen = contexts[:, None] + clamped, None
            if depths is not None:
                own_positions = contexts[:, None] + depths[rows]
                seen = _lineages(np.where(offsets < lens[:, None], parents[rows], lens[:, None] - 1), device)
            tables, rows, positions, totals, contexts, places, step_rows = (
                torch.from_numpy(array).to(device, non_blocking=True)
                for array in (
                    pages[page_firsts[members, None] + nth_page],
                    rows,
                    own_positions,
                    contexts + lens,
                    contexts,
                    places,
                    rows.flatten()[places],
                )
            )
            in_page = torch.arange(page_size, device=device)
            cache_rows = (tables[..., None] * page_size + in_page).flatten(1)
            self._groups.append(_Group(rows, cache_rows, positions, totals, contexts, seen, places, step_rows))
        self._visible: dict[tuple[int, bool], list[Tensor]] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_cache: Tensor,
        value_cache: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        is_causal: bool = True,
    ) -> Tensor:
        """Stores keys and values at the slots, if given, then attends; shapes as in `ops.paged_attention`."""
        if key is not None and value is not None:
            key_cache.index_copy_(0, self._slots, key)
            value_cache.index_copy_(0, self._slots, value)
        out = torch.empty_like(query)
        self.attend_stored(query, key_cache, value_cache, out, scale, window, softcap, is_causal)
        return out

    def attend_stored(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        out: Tensor,
        scale: float,
        window: int,
        softcap: float,
        is_causal: bool,
    ) -> None:
        """Attends where all keys and values are stored; writes the rows of the entries that attend to `out`."""
        kind = (window, is_causal)
        if kind not in self._visible:
            self._visible[kind] = [group.visible(*kind) for group in self._groups]
        for group, visible in zip(self._groups, self._visible[kind], strict=True):
            attended = _attend(
                query[group.rows], key_cache[group.cache_rows], value_cache[group.cache_rows], visible, scale, softcap
            )
            out[group.step_rows] = attended.flatten(0, 1)[group.places]


def _lineages(parents: Ints, device: torch.device) -> Tensor | None:
    """Of a group's rows [E, N]; None where they are chains."""
    if (parents == np.arange(parents.shape[1]) - 1).all():
        return None
    return torch.from_numpy(lineages(parents)).to(device, non_blocking=True)


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
