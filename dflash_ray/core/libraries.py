"""Libraries that are compiled on this machine: where they are kept, and that one process compiles each, once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

CACHE_ENV = "DFLASH_RAY_KERNEL_CACHE"


def cache_dir() -> Path:
    """Where libraries are kept: $DFLASH_RAY_KERNEL_CACHE, else dflash_ray/kernels in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_ENV) or Path(home) / "dflash_ray" / "kernels")


def compiled_once(path: Path, compile_to: Callable[[Path], None]) -> Path:
    """Has the library compiled to `path` unless it is there; `compile_to` raises RuntimeError when that fails."""
    if path.exists():  # it may lie in an image, where nothing can be written
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            compile_to(path)
    return path


def compiler() -> str:
    """The C++ compiler. Raises RuntimeError where there is none."""
    found = os.environ.get("CXX", "g++")
    if shutil.which(found) is None:
        raise RuntimeError("no C++ compiler: install g++ or set CXX")
    return found
