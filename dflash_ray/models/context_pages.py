"""Context keys and values of a drafter's sessions, in pages of one pool that all of them share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dflash_ray.core.arrays import Ints, spans

PAGE_SIZE = 64  # rows
_FIRST_PAGES = 16
_FIRST_SESSIONS = 64


class BlockPlaces(NamedTuple):
    """Where the blocks of a pass stand, as `ops.paged_attention` reads it; int64, `slots` on the pool's device."""

    slots: Tensor
    entry_lens: Tensor
    context_lens: Tensor
    page_counts: Tensor
    pages: Tensor


class ContextPages:
    """Keys and values [layers, rows, n_kv, d]; a session's rows lie in pages of its own, in the order of positions.

    Sessions are small numbers. The pool doubles when it is full: how many rows there may be is decided elsewhere. Rows
    behind a context are scratch for a block's own keys and values.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
        self.keys = torch.empty(layers, _FIRST_PAGES * PAGE_SIZE, heads, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.by_layer = list(self.keys), list(self.values)  # as operators of several layers take them
        self._free = list(reversed(range(_FIRST_PAGES)))  # pages freed last are used first: their memory is there
        self._table = np.zeros((_FIRST_SESSIONS, 8), dtype=np.int64)
        self._counts = np.zeros(_FIRST_SESSIONS, dtype=np.int64)

    def release(self, session: int) -> None:
        """Gives the session's pages back; unknown ones have none."""
        if session < len(self._counts):
            self._free += reversed(self._table[session, : self._counts[session]].tolist())
            self._counts[session] = 0

    def reserve(self, sessions: Ints, lens: Ints) -> None:
        """Sees that each session has pages for so many rows; one that comes twice counts with its longest."""
        if len(sessions) and sessions.max() >= len(self._counts):
            more = int(sessions.max()) + 1
            self._table = np.pad(self._table, ((0, more), (0, 0)))
            self._counts = np.pad(self._counts, (0, more))
        needed = -(-lens // PAGE_SIZE)
        for at in (needed > self._counts[sessions]).nonzero()[0].tolist():
            session, have = int(sessions[at]), int(self._counts[sessions[at]])
            missing = max(0, int(needed[at]) - have)
            if have + missing > self._table.shape[1]:
                self._table = np.pad(self._table, ((0, 0), (0, have + missing)))
            while len(self._free) < missing:
                self._double()
            self._table[session, have : have + missing] = [self._free.pop() for _ in range(missing)]
            self._counts[session] = have + missing

    def _double(self) -> None:
        layers, rows, *row = self.keys.shape
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(layers, 2 * rows, *row)
            new[:, :rows] = old
            setattr(self, name, new)
        self.by_layer = list(self.keys), list(self.values)
        self._free[:0] = reversed(range(rows // PAGE_SIZE, 2 * rows // PAGE_SIZE))

    def rows_of(self, sessions: Ints, starts: Ints, counts: Ints) -> Ints:
        """Rows of the pool that hold positions starts[i], starts[i] + 1, ... of sessions[i], `counts[i]` of each."""
        return self.rows_at(np.repeat(sessions, counts), spans(starts, counts))

    def rows_at(self, sessions: Ints, positions: Ints) -> Ints:
        """Rows of the pool that hold one position of each session; both may be of any shapes that fit each other."""
        rows: Ints = self._table[sessions, positions // PAGE_SIZE] * PAGE_SIZE
        rows += positions % PAGE_SIZE
        return rows

    def store(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes keys and values [layers, n, n_kv, d] to rows int64 [n] on the pool's device."""
        self.keys[:, rows] = keys
        self.values[:, rows] = values

    def place_blocks(self, sessions: Ints, lens: Ints, size: int) -> BlockPlaces:
        """Rows for a block of `size` behind each session's context of lens[i] rows."""
        slots, *tables = map(torch.from_numpy, self.reserve_blocks(sessions, lens, size))
        return BlockPlaces(slots.to(self.keys.device), *tables)

    def reserve_blocks(self, sessions: Ints, lens: Ints, size: int) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """The same on the host."""
        self.reserve(sessions, lens + size)
        positions = lens[:, None] + np.arange(size)
        slots = self.rows_at(sessions[:, None], positions)
        counts = self._counts[sessions]
        is_page = np.arange(int(counts.max(initial=0))) < counts[:, None]
        pages = self._table[sessions, : is_page.shape[1]][is_page]
        return slots.reshape(-1), np.full(len(sessions), size), lens, counts, pages
