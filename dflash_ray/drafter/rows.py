"""Rows of many sessions between a features' stream, or a router's request, and the contexts that take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from dflash_ray.core.arrays import Flags, Ints, Tokens
from dflash_ray.models.context_features import Bytes, PackedRows
from dflash_ray.models.draft_contexts import ContextRows


class Rows(NamedTuple):
    """counts[i] rows of sessions[i] at positions starts[i], starts[i] + 1, ...: those of `data` from firsts[i] on.

    Attributes:
        data: features as their message has them, [n, bytes of a row], or tokens [n].
        dtype: of the features; None for tokens.
    """

    sessions: Ints
    starts: Ints
    counts: Ints
    firsts: Ints
    data: Bytes | Tokens
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, sessions: Ints, starts: Ints, counts: Ints, data: PackedRows | Tokens) -> Rows:
        """Rows that `data` has one session's after the other's."""
        firsts = counts.cumsum() - counts
        if isinstance(data, PackedRows):
            return cls(sessions, starts, counts, firsts, data.parts[0], data.dtype)
        return cls(sessions, starts, counts, firsts, data)

    @property
    def num_rows(self) -> int:
        return int(self.counts.sum())

    @property
    def num_bytes(self) -> int:
        """Of the features."""
        return 0 if self.dtype is None else self.num_rows * self.data.shape[1]

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

    def pieces(self) -> list[Bytes | Tokens]:
        """The rows in order; those that lie one after the other are one piece."""
        ends = self.firsts + self.counts
        starts = np.append(True, self.firsts[1:] != ends[:-1]).nonzero()[0]
        lasts = np.append(starts[1:], len(ends)) - 1
        return [self.data[first:end] for first, end in zip(self.firsts[starts], ends[lasts], strict=True)]


def joined(parts: Iterable[Rows]) -> list[ContextRows]:
    """Rows for contexts, the only copy of them here: in one where all features have one dtype."""
    return [_join(list(group), dtype) for dtype, group in groupby(parts, key=lambda rows: rows.dtype)]


def _join(parts: Sequence[Rows], dtype: torch.dtype | None) -> ContextRows:
    sessions, starts, counts = (np.concatenate([rows[at] for rows in parts]) for at in range(3))
    pieces: list[Any] = [piece for rows in parts for piece in rows.pieces()]
    if dtype is None:
        return ContextRows(sessions, starts, counts, token_ids=np.concatenate(pieces).astype(np.int64))
    return ContextRows(sessions, starts, counts, features=PackedRows(dtype, pieces).tensor())
