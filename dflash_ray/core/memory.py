"""Memory that a process has freed and its allocator keeps."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Gives the system back what was freed, after a load that needed much more than what stays. glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
