"""Attention over a step's pages: planned once a step, attended in each layer.

A plan takes what follows from the step's tables to where its device reads it. On a GPU that is one buffer, filled by
one copy; with room for the largest step its address and the launches stay, so that a CUDA graph can capture them
(csrc/cuda/attention.cu). Elsewhere tables are read on the host.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.kernels import build, ops
from dflash_ray.kernels.trees import depths_of, paths_of

Ints = NDArray[np.int64]
SPLIT = 256  # positions of a context that are summed apart
TILE_ROWS = 16  # of an entry, that read keys and values together
FEW_ROWS = 64  # of an entry whose splits are summed beside each other
_COARSER = 4  # times as many rows from one reach to the next
_ROW_COLUMNS, _TILE_COLUMNS = 4, 7  # in the order of csrc/attention_core.h


class StepTables(NamedTuple):
    """int64 on the host: rows, cached rows and pages of each of E entries, all page tables in a row, parents [T].

    Parents as in `ops.paged_attention`; empty for chains.
    """

    entry_lens: Ints
    context_lens: Ints
    page_counts: Ints
    pages: Ints
    parents: Ints


class Room(NamedTuple):
    """The largest step that a plan takes.

    Attributes:
        rows, entries: of a step; pages: of the page tables of all its entries.
        max_len: cached rows and own rows of an entry.
        depth: rows on the longest path of a tree; 0: chains only.
    """

    rows: int
    entries: int
    pages: int
    max_len: int
    depth: int = 0

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int]]:
        """Of a plan's rows, tiles, paths and page tables, which lie behind each other in its memory."""
        num_tiles = min(self.rows, (self.rows + (TILE_ROWS - 1) * self.entries) // TILE_ROWS)
        return (self.rows, _ROW_COLUMNS), (num_tiles, _TILE_COLUMNS), (self.rows, self.depth), (self.pages,)

    @property
    def size(self) -> int:
        """int64 values of a plan's memory."""
        return sum(map(math.prod, self.shapes))

    def sums_bytes(self, heads: int, head_dim: int) -> int:
        """Bytes of the splits' sums while a layer attends on a GPU, by so many query heads (csrc/cuda/attention.cu)."""
        return self.rows * heads * -(-self.max_len // SPLIT) * (head_dim + 2) * 4


class PlanMemory(NamedTuple):
    """int64 [room.size or more] that a plan is written to on the host, and read from on the device.

    Whoever owns it copies one to the other.
    """

    host: Ints
    device: Tensor


class StepAttention(Protocol):
    """A planned step."""

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
        """One layer: stores keys and values in the step's slots, then attends; as `ops.paged_attention`.

        Keys and values are None where they are in the slots already. Rows behind those of all entries give 0.
        """

    def refill(self, tables: StepTables) -> int:
        """Plans another step over the same slots; they are to be written anew too.

        Returns:
            how much of its memory the plan takes, from the beginning on.

        Raises:
            ValueError: the step is larger than the plan's room.
        """


def reaches(max_len: int) -> list[int]:
    """Rows of the longest entry for which plans are worth having, ascending: a grid is as large as they say."""
    found = [max_len]
    while found[0] > _COARSER * SPLIT:
        found.insert(0, -(-found[0] // (_COARSER * SPLIT)) * SPLIT)
    return found


def plan(tables: StepTables, slots: Tensor, page_size: int) -> StepAttention:
    """Plans a step whose rows are stored at slots int64 [T], on the device of these."""
    if _has_operator(slots):
        return PagedAttention.of_step(tables, slots, page_size, torch.ops.dflash_ray.attend_pages)
    planned = HostAttention(slots, page_size)
    planned.refill(tables)
    return planned


def plan_within(room: Room, slots: Tensor, page_size: int, memory: PlanMemory) -> StepAttention:
    """A plan to refill, of steps that are no larger than `room`, over slots int64 [room.rows].

    Several may share slots and memory: the one that is filled last is planned.
    """
    if _has_operator(slots):
        return PagedAttention(room, slots, page_size, torch.ops.dflash_ray.attend_pages, memory)
    return HostAttention(slots, page_size)


def _has_operator(slots: Tensor) -> bool:
    return slots.device.type != "cpu" and build.is_loaded_for(slots.device.type)


class HostAttention:
    """By the operator that reads tables on the host: the CPU's, or plain torch for devices without operators."""

    def __init__(self, slots: Tensor, page_size: int) -> None:
        self._slots, self._page_size = slots, page_size

    def refill(self, tables: StepTables) -> int:
        self._tables = [torch.from_numpy(table) for table in tables]
        self._num_rows = int(tables.entry_lens.sum())
        return 0

    def attend(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor,
        scale: float, window: int = 0, softcap: float = 0.0, is_causal: bool = True,
    ) -> Tensor:  # fmt: skip
        num_rows = self._num_rows
        slots = self._slots[:num_rows]
        if key is None or value is None:
            key, value = key_cache[slots], value_cache[slots]
        lens, contexts, page_counts, pages, parents = self._tables
        out = ops.paged_attention(
            query[:num_rows], key[:num_rows], value[:num_rows], key_cache, value_cache, slots, lens, contexts,
            page_counts, pages, self._page_size, scale, window, softcap, is_causal, parents,
        )  # fmt: skip
        return out if num_rows == len(query) else torch.cat([out, torch.zeros_like(query[num_rows:])])


class PagedAttention:
    """By a device's operator, which reads keys and values where they lie.

    What is read stays where it is, and what is launched follows from the room alone.
    """

    def __init__(self, room: Room, slots: Tensor, page_size: int, operator: Any, memory: PlanMemory) -> None:
        self._room, self._slots, self._page_size, self._operator = room, slots, page_size, operator
        self._num_splits = -(-room.max_len // SPLIT)
        self._num_parts = room.rows * self._num_splits
        ends = np.cumsum([0, *map(math.prod, room.shapes)]).tolist()
        places = list(zip(itertools.pairwise(ends), room.shapes, strict=True))
        self._columns = [memory.host[begin:end].reshape(shape) for (begin, end), shape in places]
        self._rows, self._tiles, paths, self._pages = (
            memory.device[begin:end].view(shape) for (begin, end), shape in places
        )
        self._paths = paths if room.depth else None

    @classmethod
    def of_step(cls, tables: StepTables, slots: Tensor, page_size: int, operator: Any) -> PagedAttention:
        """Of one step, with no more blocks and memory than it needs."""
        lens, totals, splits = tables.entry_lens, tables.context_lens + tables.entry_lens, _splits_of(tables)
        firsts, depth = np.repeat(np.cumsum(lens) - lens, lens), 0
        if len(tables.parents):
            depth = int(depths_of(tables.parents, firsts).max()) + 1
        room = Room(len(slots), len(lens), len(tables.pages), int(totals.max(initial=1)), depth)
        host = torch.zeros(room.size, dtype=torch.int64)
        memory = PlanMemory(host.numpy(), torch.empty_like(host, device=slots.device))
        planned = cls(room, slots, page_size, operator, memory)
        planned._num_splits, planned._num_parts = int(splits.max(initial=0)), int((splits * lens).sum())
        planned.refill(tables)
        memory.device.copy_(host, non_blocking=True)
        return planned

    def refill(self, tables: StepTables) -> int:
        lens, contexts, page_counts, pages, parents = tables
        totals = contexts + lens
        num_rows, room = int(lens.sum()), self._room
        if num_rows > room.rows or len(lens) > room.entries or len(pages) > room.pages:
            raise ValueError(f"a step of {num_rows} rows in {len(lens)} entries on {len(pages)} pages, room is {room}")
        if totals.max(initial=0) > room.max_len:
            raise ValueError(f"a context of {totals.max()} rows, room is {room}")
        of_entry = np.repeat(np.arange(len(lens)), lens)
        firsts = np.cumsum(lens) - lens
        offsets = np.arange(num_rows) - firsts[of_entry]
        depths = depths_of(parents, firsts[of_entry]) if len(parents) else offsets
        is_tree = np.bincount(of_entry[depths != offsets], minlength=len(lens)) > 0
        rows, tiles, paths, page_tables = self._columns
        rows[num_rows:] = paths[:] = 0
        splits = _splits_of(tables)
        splits_of_row = splits[of_entry]
        part_at = np.cumsum(splits_of_row) - splits_of_row
        rows[:num_rows] = np.stack((contexts[of_entry] + depths, totals[of_entry], part_at, splits_of_row), axis=1)
        counts = -(-lens // TILE_ROWS)
        entry = np.repeat(np.arange(len(lens)), counts)
        # Rows of the entry before each tile: the last ones, which see most, start first.
        before = TILE_ROWS * (np.cumsum(counts)[entry] - 1 - np.arange(len(entry)))
        page_at = np.cumsum(page_counts) - page_counts
        own = np.minimum(lens[entry] - before, TILE_ROWS)
        columns = (firsts[entry], contexts[entry], page_at[entry], before, own, splits[entry], is_tree[entry])
        tiles[: len(entry)], tiles[len(entry) :] = np.stack(columns, axis=1), 0
        page_tables[: len(pages)] = pages
        if is_tree.any():
            at = np.flatnonzero(is_tree[of_entry])  # chains beside them may be longer than any path
            found = paths_of(parents[at], np.searchsorted(at, firsts[of_entry][at]), depths[at])
            if found.shape[1] > room.depth:
                raise ValueError(f"a tree of depth {found.shape[1]}, room is {room}")
            paths[at, : found.shape[1]] = found
        return room.size - room.pages + len(pages)

    def attend(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor,
        scale: float, window: int = 0, softcap: float = 0.0, is_causal: bool = True,
    ) -> Tensor:  # fmt: skip
        paths = self._paths if is_causal else None
        out: Tensor = self._operator(
            query, key, value, key_cache, value_cache, self._slots, self._rows, self._tiles, self._pages, paths,
            self._page_size, self._num_splits, self._num_parts, scale, window, softcap, is_causal,
        )  # fmt: skip
        return out


def _splits_of(tables: StepTables) -> Ints:
    """Splits of each entry that are summed beside each other; one for all of a prompt's part."""
    splits = -(-(tables.context_lens + tables.entry_lens) // SPLIT)
    few: Ints = np.where(tables.entry_lens <= FEW_ROWS, splits, 1)
    return few
