"""Context features in memory that a target shares with the drafters of its machine: rows are named instead of sent.

The target writes a row once, where it keeps it. A page is handed on without asking its readers: `uses` counts how
often it was begun, and a reader that finds another count after its copy than its message named has lost these rows.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_ray.core.arrays import Flags, Ints, column, spans
from dflash_ray.core.shared_memory import create, open_shared
from dflash_ray.models.context_features import DTYPES, Bytes, dtype_name, wire_dtype
from dflash_ray.pb import target_pb2

Uses = NDArray[np.uint32]


class FeaturePages:
    """Rows of `num_pages` pages, and before them how often each page was begun.

    Attributes:
        uses: [num_pages].
        rows: [num_pages * page_size, bytes of a row].
        dtype: of the features, as they travel.
        offer: by which drafters find the target's memory.
    """

    def __init__(self, memory: mmap.mmap, offer: target_pb2.FeatureMemory) -> None:
        num_pages, self.page_size, self.dtype = offer.num_pages, offer.page_size, DTYPES[offer.dtype]
        row_bytes = offer.width * self.dtype.itemsize
        num_bytes = num_pages * self.page_size * row_bytes
        self.offer = offer
        self.uses: Uses = np.frombuffer(memory, np.uint32, num_pages)
        self.rows: Bytes = np.frombuffer(memory, np.uint8, num_bytes, _rows_at(num_pages)).reshape(-1, row_bytes)

    @classmethod
    def create(cls, num_pages: int, page_size: int, width: int, dtype: torch.dtype) -> FeaturePages | None:
        """The target's; None where memory cannot be shared, or features of this dtype not be read as they are."""
        if wire_dtype(dtype) is not dtype:
            return None
        offer = target_pb2.FeatureMemory(num_pages=num_pages, page_size=page_size, width=width, dtype=dtype_name(dtype))
        memory = create(_num_bytes(offer))
        if memory is None:
            return None
        offer.pid, offer.fd, offer.name = memory.pid, memory.fd, memory.name
        return cls(memory.memory, offer)

    @classmethod
    def open(cls, offer: target_pb2.FeatureMemory, width: int) -> FeaturePages:
        """A drafter's, for reading.

        Raises OSError where the memory is not to be had here, ValueError when it is not of such features.
        """
        if offer.dtype not in DTYPES or offer.width != width or not offer.page_size:
            raise ValueError(f"features: memory of width {offer.width} and dtype {offer.dtype} for features of {width}")
        return cls(open_shared(offer.pid, offer.fd, offer.name, _num_bytes(offer)), offer)

    def begin(self, places: Ints) -> None:
        """Rows are going to be written: pages whose first row is among them are another sequence's from here on."""
        pages, in_page = np.divmod(places, self.page_size)
        self.uses[pages[in_page == 0]] += 1

    def named(self, columns: target_pb2.NamedFeatures) -> NamedRows:
        """The rows that a message names. Raises ValueError when its columns do not belong together."""
        starts, counts, pages = column(columns.starts), column(columns.num_rows), column(columns.pages)
        if not len(starts) == len(counts) == len(columns.subscription_ids):
            count = len(columns.subscription_ids)
            raise ValueError(f"features: starts and num_rows must have {count} elements, one a subscription")
        firsts, num_pages = pages_of(starts, counts, self.page_size)
        if not len(pages) == len(columns.uses) == num_pages.sum():
            raise ValueError(f"features: pages and uses must have {num_pages.sum()} elements")
        if pages.max(initial=0) >= len(self.uses):
            raise ValueError(f"features: page {pages.max()} of {len(self.uses)}")
        nth, in_page = np.divmod(spans(starts, counts), self.page_size)
        nth += np.repeat(num_pages.cumsum() - num_pages - firsts, counts)
        return NamedRows(self, pages[nth] * self.page_size + in_page, np.array(columns.uses, np.uint32)[nth])


class NamedRows(NamedTuple):
    """Rows [n] of shared pages.

    Attributes:
        places: rows of `pages`.
        uses: how often the page of each had been begun when it was named.
    """

    pages: FeaturePages
    places: Ints
    uses: Uses

    def copy_to(self, out: Bytes, index: Ints) -> None:
        """Copies those at `index`."""
        self.pages.rows.take(self.places[index], axis=0, out=out, mode="clip")

    def is_gone(self, index: Ints) -> Flags:
        """Of those at `index`: their place is another sequence's, and what was copied from it may be so, too."""
        gone: Flags = self.pages.uses[self.places[index] // self.pages.page_size] != self.uses[index]
        return gone


def pages_of(starts: Ints, counts: Ints, page_size: int) -> tuple[Ints, Ints]:
    """Of `counts` rows from `starts` on: the first one's page among the sequence's, and how many pages they are in."""
    firsts = starts // page_size
    return firsts, -(-(starts + counts) // page_size) - firsts


def encode_named(
    subscription_ids: Sequence[int], starts: Sequence[int], num_rows: Sequence[int], pages: Ints, uses: Ints | Uses
) -> bytes:
    """A FeaturesResponse that names rows."""
    named = target_pb2.NamedFeatures(
        subscription_ids=subscription_ids, starts=starts, num_rows=num_rows, pages=pages.tolist(), uses=uses.tolist()
    )
    return target_pb2.FeaturesResponse(named=named).SerializeToString()


def _rows_at(num_pages: int) -> int:
    """Where rows begin: behind the counts, at the next page of memory."""
    return -(-num_pages * 4 // mmap.PAGESIZE) * mmap.PAGESIZE


def _num_bytes(offer: target_pb2.FeatureMemory) -> int:
    return _rows_at(offer.num_pages) + offer.num_pages * offer.page_size * offer.width * DTYPES[offer.dtype].itemsize
