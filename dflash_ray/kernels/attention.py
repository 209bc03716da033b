"""Attention over a step's pages: planned once a step, attended in each layer.

A plan takes what follows from the step's tables to where its device reads it. On CPU the operator reads tables on the
host. On a GPU a kernel attends in place for entries of few rows, as decoding has them, and no row's result depends on
its neighbours (csrc/cuda/attention.cu); longer entries, parts of prompts, are padded products.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.kernels import build, ops
from dflash_ray.kernels.padded import PaddedStep
from dflash_ray.kernels.trees import depths_of, paths_of

Ints = NDArray[np.int64]
SPLIT = 256  # positions of a context that are summed apart
FEW_ROWS = 64  # of an entry that is no part of a prompt


class StepTables(NamedTuple):
    """int64 on the host: rows, cached rows and pages of each of E entries, all page tables in a row, parents [T].

    Parents as in `ops.paged_attention`; empty for chains.
    """

    entry_lens: Ints
    context_lens: Ints
    page_counts: Ints
    pages: Ints
    parents: Ints


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

        Keys and values are None where they are in the slots already.
        """


def plan(tables: StepTables, slots: Tensor, page_size: int) -> StepAttention:
    """Plans a step whose rows are stored at slots int64 [T], on the device of these."""
    if slots.device.type == "cpu":
        return HostAttention(tables, slots, page_size)
    if build.is_loaded_for(slots.device.type):
        return PagedAttention(tables, slots, page_size, torch.ops.dflash_ray.attend_pages)
    return PaddedStep(*tables, slots, page_size)


class HostAttention:
    """By the CPU's operator."""

    def __init__(self, tables: StepTables, slots: Tensor, page_size: int) -> None:
        self._slots, self._page_size = slots, page_size
        self._tables = [torch.from_numpy(table) for table in tables]

    def attend(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor,
        scale: float, window: int = 0, softcap: float = 0.0, is_causal: bool = True,
    ) -> Tensor:  # fmt: skip
        if key is None or value is None:
            key, value = key_cache[self._slots], value_cache[self._slots]
        lens, contexts, page_counts, pages, parents = self._tables
        return ops.paged_attention(
            query, key, value, key_cache, value_cache, self._slots, lens, contexts, page_counts, pages,
            self._page_size, scale, window, softcap, is_causal, parents,
        )  # fmt: skip


class PagedAttention:
    """By a device's operator, which reads keys and values where they lie."""

    def __init__(self, tables: StepTables, slots: Tensor, page_size: int, operator: Any) -> None:
        self._slots, self._page_size, self._operator = slots, page_size, operator
        lens, contexts, page_counts, pages, parents = tables
        totals = contexts + lens
        self._num_splits = int(-(-totals.max(initial=1) // SPLIT))
        is_few = lens <= FEW_ROWS
        of_entry = np.repeat(np.arange(len(lens)), lens)
        firsts = (np.cumsum(lens) - lens)[of_entry]
        rows = np.arange(len(of_entry))
        depths = depths_of(parents, firsts) if len(parents) else rows - firsts
        page_at = (np.cumsum(page_counts) - page_counts)[of_entry]
        context = contexts[of_entry]
        # A line for each row, in the order of csrc/attention_core.h.
        columns = (rows, context, context + depths, totals[of_entry], firsts, page_at)
        chosen = is_few[of_entry]
        lines = np.ascontiguousarray(np.stack(columns, axis=1)[chosen])
        is_tree = len(parents) > 0 and bool((depths != rows - firsts).any())
        self._paths = self._on_device(paths_of(parents, firsts, depths)[chosen]) if is_tree else None
        self._lines, self._pages = self._on_device(lines), self._on_device(pages)
        self._long = None if is_few.all() else PaddedStep(*tables, slots, page_size, ~is_few)

    def _on_device(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._slots.device, non_blocking=True)

    def attend(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor,
        scale: float, window: int = 0, softcap: float = 0.0, is_causal: bool = True,
    ) -> Tensor:  # fmt: skip
        paths = self._paths if is_causal else None
        out: Tensor = self._operator(
            query, key, value, key_cache, value_cache, self._slots, self._lines, self._pages, paths, self._page_size,
            self._num_splits, scale, window, softcap, is_causal,
        )  # fmt: skip
        if self._long is not None:
            self._long.attend_stored(query, key_cache, value_cache, out, scale, window, softcap, is_causal)
        return out
