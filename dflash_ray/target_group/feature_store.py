"""Context features of the cache's rows, for drafters and for sequences that found their rows computed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dflash_ray.core import host_code
from dflash_ray.core.arrays import spans
from dflash_ray.models.context_features import Bytes, PackedRows, bytes_of, pack, rows_per_piece, wire_dtype
from dflash_ray.models.feature_pages import FeaturePages, Uses
from dflash_ray.target_group.step import Ints, StepFeatures


class FeatureStore:
    """[num_rows, width]; a position's row is its slot in the KV cache.

    So features are freed with their sequence's pages, and the store never grows: its memory is touched as pages are
    first used, and rows are copied in and read in place. Rows of a page that was handed on are stale until they are put
    again.

    Args:
        dtype: of the features, the model's.
        device: the host's memory for remote drafters, the model's for a colocated one.
        shared: the memory to keep them in, which drafters of this machine read.
    """

    def __init__(
        self, num_rows: int, width: int, dtype: torch.dtype, device: str = "cpu", shared: FeaturePages | None = None
    ) -> None:
        if shared is None:
            self._rows = torch.empty(num_rows, width, dtype=dtype, device=device)
        else:
            self._rows = torch.from_numpy(shared.rows).view(dtype)
        self.shared = shared
        self._bytes = bytes_of(self._rows) if device == "cpu" else None
        self._dtype = wire_dtype(dtype)
        self.rows_per_piece = rows_per_piece(width, dtype)  # that one message holds

    @property
    def num_bytes(self) -> int:
        """Most that it can ever take."""
        return self._rows.nbytes

    def put(self, features: StepFeatures) -> None:
        """Copies the kept rows of a step's features to their places."""
        sources = spans(features.first_rows, features.num_rows)
        places = features.cache_rows
        if self._bytes is None:
            to, of = (torch.from_numpy(index).to(self._rows.device) for index in (places, sources))
            self._rows.index_copy_(0, to, features.rows.index_select(0, of))
            return
        if self.shared is not None:
            self.shared.begin(places)
        rows = bytes_of(features.rows.contiguous())
        # Runs of rows are copied as they are: gathering them first would be a copy more.
        firsts, counts = _runs(places, sources)
        runs = np.stack((places[firsts], sources[firsts], counts)) * rows.shape[1]
        copy_runs(self._bytes, rows, runs)

    def get(self, places: Ints) -> Tensor:
        """A copy [n, width] of the rows `places`."""
        return self._rows.index_select(0, torch.from_numpy(places).to(self._rows.device))

    def read(self, places: Ints) -> PackedRows:
        """The rows `places` as they travel. On a host they are the store's own: whoever keeps them copies."""
        if self._bytes is None or self._rows.dtype is not self._dtype:
            return pack(self.get(places))
        firsts, counts = _runs(places)
        runs = zip(places[firsts].tolist(), counts.tolist(), strict=True)
        return PackedRows(self._dtype, [self._bytes[place : place + count] for place, count in runs])

    def uses(self, pages: Ints) -> Uses:
        """How often shared pages have been begun."""
        assert self.shared is not None
        uses: Uses = self.shared.uses[pages]
        return uses


def copy_runs(to: Bytes, of: Bytes, runs: Ints) -> None:
    """Copies runs [3, n] of bytes: where each one's begin in `to` and in `of`, and how many they are."""
    compiled = host_code.library()
    if compiled is not None:  # which leaves other threads running meanwhile
        compiled.copy_runs(host_code.at(to), host_code.at(of), *map(host_code.at, runs), runs.shape[1])
        return
    kept, made = to.reshape(-1).data, of.reshape(-1).data
    for place, source, size in zip(*runs.tolist(), strict=True):
        kept[place : place + size] = made[source : source + size]


def _runs(*columns: Ints) -> tuple[Ints, Ints]:
    """Where runs begin that are of consecutive numbers in all the columns, and how long each is."""
    is_first = np.zeros(len(columns[0]), dtype=np.bool_)
    is_first[:1] = True
    for column in columns:
        is_first[1:] |= column[1:] != column[:-1] + 1
    ends = np.append(is_first.nonzero()[0], len(is_first))
    return ends[:-1], ends[1:] - ends[:-1]
