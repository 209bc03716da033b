"""Memory of this process that nothing uses any more."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt in glibc
# What glibc comes to by itself where blocks of that size are freed: set, it holds from the first message on.
_LARGEST_KEPT = 32 * 1024 * 1024  # allocations above it come from the system and go back to it
_KEPT_BYTES = 2 * _LARGEST_KEPT  # at most, of what was freed at the end of the heap


def keep_freed_memory() -> None:
    """Keeps some of what is freed for what is allocated next; where the C library cannot, nothing happens.

    Otherwise every message of features comes from the system and is zeroed page by page, at more than its copy costs.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_MMAP_THRESHOLD, _LARGEST_KEPT)
        option(_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Gives the system back what was freed; where the C library cannot, nothing happens.

    After loading, the allocator holds as much as the weights took before they were packed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
