"""Context features of the cache's rows, for replays to a remote drafter and for rows that a sequence found computed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.models.context_features import rows_per_piece
from dflash_ray.target_group.step import Ints, StepFeatures


class FeatureStore:
    """[num_rows, width]; a position's row is its slot in the KV cache.

    So features are freed with their sequence's pages, and the store never grows: its memory is touched as pages are
    first used, and rows are copied in and out. Rows of a page that was handed on are stale until they are put again.

    Args:
        dtype: of the features, the model's.
        device: the host's memory for remote drafters, the model's for a colocated one.
    """

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> None:
        self._rows = torch.empty(num_rows, width, dtype=dtype, device=device)
        self.rows_per_piece = rows_per_piece(width, dtype)  # that one message of a replay holds

    @property
    def num_bytes(self) -> int:
        """Most that it can ever take."""
        return self._rows.nbytes

    def put(self, features: StepFeatures) -> None:
        """Copies the kept rows of a step's features to their places."""
        counts = features.num_rows
        places = features.cache_rows
        index = np.arange(len(places)) + np.repeat(features.first_rows - np.cumsum(counts) + counts, counts)
        if self._rows.device.type == "cpu":
            _words(self._rows)[places] = _words(features.rows.contiguous())[index]
        else:
            to, of = (torch.from_numpy(rows).to(self._rows.device) for rows in (places, index))
            self._rows.index_copy_(0, to, features.rows.index_select(0, of))

    def get(self, slots: Ints) -> Tensor:
        """A copy [n, width] of the rows `slots`."""
        return self._rows.index_select(0, torch.from_numpy(slots).to(self._rows.device))


def _words(rows: Tensor) -> NDArray[np.generic]:
    """Rows as integers, as few as may be: numpy copies them several times faster than torch does bfloat16."""
    size = rows.shape[1] * rows.itemsize
    return rows.view(
        next(dtype for dtype in (torch.int64, torch.int32, torch.int16) if not size % dtype.itemsize)
    ).numpy()
