"""The host's C functions (csrc/host.c), compiled once, in a second, as they need nothing of torch.

They are called without the interpreter's lock, so that the event loop goes on beside a copy. The library is cached
under a name made of its source, and a second process only loads it. Where there is no compiler the numpy twins of the
functions do their work, with one warning.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core.libraries import cache_dir, compiled_once, compiler

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).parent / "csrc" / "host.c"
_FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC", "-Wall")  # for any processor of its kind
_Values = ctypes.c_char * 0
# How many addresses and numbers each takes, all of 64 bits.
_FUNCTIONS = {"copy_runs": 6, "gather_rows": 14, "page_tables": 6}


def build() -> Path:
    """Compiles the library unless it is there. Raises RuntimeError with the compiler's text when that fails."""
    source = SOURCE.read_bytes()
    digest = hashlib.sha256(f"{platform.machine()} {_FLAGS}".encode() + source).hexdigest()[:16]
    return compiled_once(cache_dir() / f"host-{digest}.so", _compile)


def _compile(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run(
            [compiler(), "-x", "c", *_FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} could not be compiled: {done.stderr}")
        os.replace(made, path)  # whole, or not at all


@cache
def library() -> Any | None:
    """The functions, which take addresses (`at`) and numbers; None where they cannot be had."""
    try:
        loaded = ctypes.CDLL(str(build()))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("the host's loops run in numpy, which is slower: they could not be compiled (%s)", reason)
        return None
    for name, count in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.c_int64] * count, None
    return loaded


def at(array: NDArray[np.generic]) -> int:
    """Where an array's values lie. It must be contiguous and writeable, and live until the function has returned."""
    return ctypes.addressof(_Values.from_buffer(array.data))  # a third of what numpy's own ways to it take
