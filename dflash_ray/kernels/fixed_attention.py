"""Attention of passes of a fixed number of rows: what each row sees is a line in a buffer on the device.

The operator is `attend_pages` (csrc/attention_core.h). A row of a chain sees its sequence's cached rows up to itself,
all by the page table, since a layer stores keys and values before it attends; so rows of prompts are rows like others.
A row of a tree sees the context and the rows on its path.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.kernels import build
from dflash_ray.kernels.attention import SPLIT
from dflash_ray.kernels.trees import depths_of, paths_of

Ints = NDArray[np.int64]
MOST_DEPTH = 32  # rows on a path of a tree, the root among them
# Of a line: the row, cached rows by the page table, position of the last row seen among what is seen, rows of the entry
# in all, first row of the entry, place of its page table.
LINE_ROW, LINE_LAST, LINE_FIRST, LINE_PAGE, LINE_WIDTH = 0, 2, 4, 5, 6


class RowLines(NamedTuple):
    """int64 lines [T, 6], and paths [T, MOST_DEPTH] where some rows are of trees."""

    lines: Ints
    paths: Ints | None


def row_lines(entry_lens: Ints, context_lens: Ints, page_counts: Ints, parents: Ints, is_whole: Ints) -> RowLines:
    """What each row of a step's E entries sees.

    Args:
        parents: [T] as in `ops.paged_attention`; empty for chains.
        is_whole: [E] whether an entry's rows may be those of a tree, none of them deeper than MOST_DEPTH.
    """
    of_entry = np.repeat(np.arange(len(entry_lens)), entry_lens)
    rows = np.arange(len(of_entry))
    firsts = (np.cumsum(entry_lens) - entry_lens)[of_entry]
    context, page_at = context_lens[of_entry], (np.cumsum(page_counts) - page_counts)[of_entry]
    places = context + rows - firsts
    lines = np.stack((rows, places, places, places + 1, rows, page_at), axis=1)
    if not len(parents):
        return RowLines(lines, None)
    depths = depths_of(parents, firsts)
    at = np.flatnonzero(is_whole[of_entry])
    totals = context + entry_lens[of_entry]
    lines[at] = np.stack((rows, context, context + depths, totals, firsts, page_at), axis=1)[at]
    paths = np.zeros((len(rows), MOST_DEPTH), dtype=np.int64)
    if len(at):
        # The rows before an entry that is left out keep their numbers, so its own are counted from its first.
        renumbered = np.searchsorted(at, firsts[at])
        found = paths_of(parents[at], renumbered, depths[at])
        paths[at, : found.shape[1]] = found
    return RowLines(lines, paths)


class FixedAttention:
    """A `StepAttention` over buffers that are filled for each pass.

    Args:
        slots: int64 [N], where the rows' keys and values are.
        lines, pages, paths: int64 [N, 6], the page tables of all entries in a row, [N, MOST_DEPTH] or None.
        num_splits: parts of SPLIT rows of the longest sequence that a pass may have; how many does not change a result.
    """

    def __init__(
        self, slots: Tensor, lines: Tensor, pages: Tensor, paths: Tensor | None, page_size: int, num_splits: int
    ) -> None:
        self._tables = (slots, lines, pages, paths, page_size, num_splits)
        is_compiled = slots.device.type != "cpu" and build.is_loaded_for(slots.device.type)
        self._operator: Any = torch.ops.dflash_ray.attend_pages if is_compiled else attend_pages

    def attend(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor,
        scale: float, window: int = 0, softcap: float = 0.0, is_causal: bool = True,
    ) -> Tensor:  # fmt: skip
        """One layer, as `attention.StepAttention.attend`."""
        out: Tensor = self._operator(
            query, key, value, key_cache, value_cache, *self._tables, scale, window, softcap, is_causal
        )
        return out


def attend_pages(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor, slots: Tensor,
    lines: Tensor, pages: Tensor, paths: Tensor | None, page_size: int, num_splits: int, scale: float, window: int,
    softcap: float, is_causal: bool,
) -> Tensor:  # fmt: skip
    """The operator in plain torch, of one shape whatever the lines hold: every row over `num_splits` parts."""
    if key is not None and value is not None:
        key_cache.index_copy_(0, slots, key)
        value_cache.index_copy_(0, slots, value)
    rows, context, position, total, firsts, page_at = lines[:, :, None].unbind(1)  # [N, 1] each
    at = torch.arange(num_splits * SPLIT, device=lines.device)[None]  # [1, S]
    own = (at - context).clamp(min=0)
    if paths is not None:
        own = paths.gather(1, own.clamp(max=paths.shape[1] - 1))
    in_pages = pages[(page_at + at // page_size).clamp(max=len(pages) - 1)] * page_size + at % page_size
    cache_rows = torch.where(at < context, in_pages, slots[(firsts + own).clamp(max=len(slots) - 1)])
    is_seen = at <= position if is_causal else at < total
    if window:
        is_seen &= (position - at).abs() < window
    cache_rows = torch.where(is_seen, cache_rows, slots[rows])
    keys, values = key_cache[cache_rows].float(), value_cache[cache_rows].float()  # [N, S, n_kv, d]
    heads = query[rows[:, 0]].float().unflatten(1, (keys.shape[2], -1))  # [N, n_kv, g, d]
    scores = torch.einsum("nkgd,nskd->nkgs", heads, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~is_seen[:, None, None], float("-inf")).softmax(-1)
    out = torch.empty_like(query)
    out[rows[:, 0]] = torch.einsum("nkgs,nskd->nkgd", weights, values).flatten(1, 2).to(query.dtype)
    return out
