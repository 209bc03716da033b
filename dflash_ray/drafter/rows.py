"""Rows of many sessions between a features' stream, or a router's request, and the contexts that take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_ray.core.arrays import Flags, Ints, Tokens, spans
from dflash_ray.models.context_features import Bytes, PackedRows
from dflash_ray.models.draft_contexts import ContextRows
from dflash_ray.models.feature_pages import NamedRows


class Rows(NamedTuple):
    """counts[i] rows of sessions[i] at positions starts[i], starts[i] + 1, ...: those of `data` from firsts[i] on.

    Attributes:
        data: features as their message has them, [n, bytes of a row], or has named them; or tokens [n].
        dtype: of the features; None for tokens.
    """

    sessions: Ints
    starts: Ints
    counts: Ints
    firsts: Ints
    data: Bytes | NamedRows | Tokens
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, sessions: Ints, starts: Ints, counts: Ints, data: PackedRows | NamedRows | Tokens) -> Rows:
        """Rows that `data` has one session's after the other's."""
        firsts = counts.cumsum() - counts
        if isinstance(data, PackedRows):
            return cls(sessions, starts, counts, firsts, data.parts[0], data.dtype)
        if isinstance(data, NamedRows):
            return cls(sessions, starts, counts, firsts, data, data.pages.dtype)
        return cls(sessions, starts, counts, firsts, data)

    @property
    def num_rows(self) -> int:
        return int(self.counts.sum())

    @property
    def num_bytes(self) -> int:
        """Of the features that this process holds."""
        if self.dtype is None or isinstance(self.data, NamedRows):
            return 0
        return self.num_rows * int(self.data.shape[1])

    def only(self, flags: Flags) -> Rows:
        """Those of some of the sessions."""
        return self._replace(
            sessions=self.sessions[flags],
            starts=self.starts[flags],
            counts=self.counts[flags],
            firsts=self.firsts[flags],
        )

    def after(self, skipped: Ints) -> Rows:
        """Without so many of each session's first."""
        return self._replace(starts=self.starts + skipped, counts=self.counts - skipped, firsts=self.firsts + skipped)

    def split(self, num_rows: int) -> tuple[Rows, Rows]:
        """The first `num_rows` rows, and the others."""
        firsts = np.clip(num_rows - (self.counts.cumsum() - self.counts), 0, self.counts)
        head = self._replace(counts=firsts)
        return head.only(firsts > 0), self.after(firsts).only(firsts < self.counts)

    def copy_to(self, out: NDArray[Any]) -> Ints:
        """Copies the rows in order; returns the sessions some of whose rows are gone, whose part of `out` is void."""
        if isinstance(self.data, NamedRows):
            index = spans(self.firsts, self.counts)
            self.data.copy_to(out, index)
            is_gone = self.data.is_gone(index)
            return np.repeat(self.sessions, self.counts)[is_gone] if is_gone.any() else self.sessions[:0]
        # Rows that lie one after the other are copied at once.
        ends = self.firsts + self.counts
        starts = np.append(True, self.firsts[1:] != ends[:-1]).nonzero()[0]
        lasts = np.append(starts[1:], len(ends)) - 1
        at = 0
        for first, end in zip(self.firsts[starts].tolist(), ends[lasts].tolist(), strict=True):
            out[at : at + end - first] = self.data[first:end]
            at += end - first
        return self.sessions[:0]


def joined(parts: Iterable[Rows]) -> tuple[list[ContextRows], set[int]]:
    """Rows for contexts, the only copy of them here, in one where all features have one dtype; and the sessions some of

    whose rows are gone, which are not among them.
    """
    found, gone = [], set[int]()
    for _, group in groupby(parts, key=lambda rows: rows.dtype):
        left = _without(list(group), gone)
        while left:
            rows, lost = _join(left)
            if not lost:
                found.append(rows)
                break
            gone |= lost
            left = _without(left, lost)
    return found, gone


def _without(parts: list[Rows], sessions: set[int]) -> list[Rows]:
    if not sessions:
        return parts
    others = [rows.only(~np.isin(rows.sessions, list(sessions))) for rows in parts]
    return [rows for rows in others if len(rows.sessions)]


def _join(parts: Sequence[Rows]) -> tuple[ContextRows, set[int]]:
    sessions, starts, counts = (np.concatenate([rows[at] for rows in parts]) for at in range(3))
    num_rows, dtype, data = int(counts.sum()), parts[0].dtype, parts[0].data
    if dtype is None:
        token_ids = np.empty(num_rows, dtype=np.int64)
        _copy(parts, token_ids)
        return ContextRows(sessions, starts, counts, token_ids=token_ids), set()
    row_bytes = (data.pages.rows if isinstance(data, NamedRows) else data).shape[1]
    features = np.empty((num_rows, row_bytes), dtype=np.uint8)
    lost = _copy(parts, features)
    return ContextRows(sessions, starts, counts, features=torch.from_numpy(features).view(dtype)), lost


def _copy(parts: Sequence[Rows], out: NDArray[Any]) -> set[int]:
    gone, at = set[int](), 0
    for rows in parts:
        num_rows = rows.num_rows
        gone.update(rows.copy_to(out[at : at + num_rows]).tolist())
        at += num_rows
    return gone
