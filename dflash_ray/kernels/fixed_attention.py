"""Attention of passes of a fixed number of rows: what each row sees is a line in memory that stays where it is.

The operator is `attend_pages` (csrc/attention_core.h). A row of a chain sees its sequence's cached rows up to itself,
all by the page table, since a layer stores keys and values before it attends; so rows of prompts are rows like others.
A row of a tree sees the context and the rows on its path. Rows behind those of all entries see themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.kernels import build
from dflash_ray.kernels.attention import SPLIT, StepTables
from dflash_ray.kernels.trees import depths_of, paths_of

Ints = NDArray[np.int64]
_LINE = 6  # columns, in the order of csrc/attention_core.h


class Room(NamedTuple):
    """The largest pass that a plan takes.

    Attributes:
        rows: of a pass; pages: of the page tables of all its entries.
        max_len: cached rows and own rows of an entry; how many does not change a result.
        depth: rows on the longest path of a tree; 0: chains only.
    """

    rows: int
    pages: int
    max_len: int
    depth: int = 0

    @property
    def size(self) -> int:
        """int64 values of a plan's memory."""
        return self.rows * (_LINE + self.depth) + self.pages


class FixedAttention:
    """A `StepAttention` that is planned anew for each pass.

    Args:
        slots: int64 [room.rows], where the rows' keys and values are.
        host, memory: int64 [room.size or more], what a pass is written to and what the device reads: whoever owns them
            copies one to the other.
    """

    def __init__(self, room: Room, slots: Tensor, page_size: int, host: Ints, memory: Tensor) -> None:
        self._room = room
        self._lines, self._paths, self._pages = _parts(room, host)
        lines, paths, pages = _parts(room, memory)
        num_splits = -(-room.max_len // SPLIT)
        self._tables = (slots, lines, pages, paths if room.depth else None, page_size, num_splits)
        is_compiled = slots.device.type != "cpu" and build.is_loaded_for(slots.device.type)
        self._operator: Any = torch.ops.dflash_ray.attend_pages if is_compiled else attend_pages

    def refill(self, tables: StepTables) -> int:
        """Plans a pass; returns how much of the host's memory it is."""
        lens, contexts, page_counts, pages, parents = tables
        of_entry = np.repeat(np.arange(len(lens)), lens)
        rows = np.arange(len(of_entry))
        firsts = (np.cumsum(lens) - lens)[of_entry]
        context, page_at = contexts[of_entry], (np.cumsum(page_counts) - page_counts)[of_entry]
        places, lines = context + rows - firsts, self._lines
        lines[: len(rows)] = np.stack((rows, places, places, places + 1, rows, page_at), axis=1)
        lines[len(rows) :] = (0, 0, 0, 1, 0, 0)
        lines[len(rows) :, [0, 4]] = np.arange(len(rows), self._room.rows)[:, None]
        if len(parents):
            self._refill_trees(tables, of_entry, firsts)
        elif self._room.depth:
            self._paths[:] = 0
        self._pages[: len(pages)] = pages
        return self._room.size - self._room.pages + len(pages)

    def _refill_trees(self, tables: StepTables, of_entry: Ints, firsts: Ints) -> None:
        """Lines and paths of the entries that are no chains."""
        depths, rows = depths_of(tables.parents, firsts), np.arange(len(of_entry))
        is_branched = np.bincount(of_entry, depths != rows - firsts, minlength=len(tables.entry_lens)) > 0
        at = np.flatnonzero(is_branched[of_entry])
        self._paths[:] = 0
        if not len(at):
            return
        context, total = (each[of_entry[at]] for each in (tables.context_lens, tables.context_lens + tables.entry_lens))
        columns = (at, context, context + depths[at], total, firsts[at])
        self._lines[at, : _LINE - 1] = np.stack(columns, axis=1)
        found = paths_of(tables.parents[at], np.searchsorted(at, firsts[at]), depths[at])
        self._paths[at, : found.shape[1]] = found

    def attend(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor,
        scale: float, window: int = 0, softcap: float = 0.0, is_causal: bool = True,
    ) -> Tensor:  # fmt: skip
        """One layer, as `attention.StepAttention.attend`."""
        out: Tensor = self._operator(
            query, key, value, key_cache, value_cache, *self._tables, scale, window, softcap, is_causal
        )
        return out


def _parts(room: Room, memory: Any) -> Any:
    """Lines [rows, 6], paths [rows, depth] and page tables in a plan's memory, on the host or on the device."""
    paths_at, pages_at = room.rows * _LINE, room.rows * (_LINE + room.depth)
    lines, paths = memory[:paths_at], memory[paths_at:pages_at]
    return lines.reshape(room.rows, _LINE), paths.reshape(room.rows, room.depth), memory[pages_at : room.size]


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
