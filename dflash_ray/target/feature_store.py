"""Context features of live sequences on rank 0's host, for replays to a remote drafter."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_ray.models.context_features import rows_per_piece


class FeatureStore:
    """[num_rows, width] in the dtype of the features; a position's row is its slot in the KV cache.

    So features are freed with their sequence's pages, and the store never grows: its memory is touched as pages are
    first used, and rows are copied in and out. Rows of a page that was handed on are stale until they are put again.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._rows: Tensor | None = None  # allocated with the first features, whose width and dtype it has

    @property
    def num_bytes(self) -> int:
        """Most that it can ever take."""
        return 0 if self._rows is None else self._rows.nbytes

    @property
    def rows_per_piece(self) -> int:
        """Rows that one message of a replay holds."""
        return 0 if self._rows is None else rows_per_piece(self._rows.shape[1], self._rows.dtype)

    def put(self, slots: list[int], features: Tensor) -> None:
        """Copies features [n, width] of the host into the rows `slots`."""
        if self._rows is None:
            self._rows = torch.empty(self._num_rows, features.shape[1], dtype=features.dtype)
        self._rows[slots] = features

    def get(self, slots: list[int]) -> Tensor:
        """A copy of the rows `slots`, all of which were put."""
        assert self._rows is not None
        return self._rows[slots]
