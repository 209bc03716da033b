"""Memory of this process that nothing uses any more."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Gives the system back what was freed; where the C library cannot, nothing happens.

    After loading, the allocator holds as much as the weights took before they were packed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
