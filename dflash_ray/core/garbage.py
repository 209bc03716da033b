"""What Python's garbage collector looks through."""

from __future__ import annotations

import gc


def leave_out_what_stands() -> None:
    """Leaves the objects that there are now out of all further collections: libraries, vocabularies and the like.

    A process that makes some thousand small objects a step would look through them again and again.
    """
    gc.collect()
    gc.freeze()
