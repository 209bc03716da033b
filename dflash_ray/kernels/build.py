"""Compiles the operators once and loads them into torch.

The library is cached under a name made of its sources, torch and the processor, so a second process only loads it.
Where there is no compiler the plain torch functions of `reference` stand in, with one warning.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)
CACHE_ENV = "DFLASH_RAY_KERNEL_CACHE"
_SOURCES = Path(__file__).parent / "csrc"
_NAME = "dflash_ray_kernels"
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall")


def cache_dir() -> Path:
    """Where libraries are kept: $DFLASH_RAY_KERNEL_CACHE, else dflash_ray/kernels in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_ENV) or Path(home) / "dflash_ray" / "kernels")


def library_path() -> Path:
    """Where the library for this machine is, or would be after `build`."""
    return cache_dir() / _fingerprint() / f"{_NAME}.so"


def build() -> Path:
    """Compiles the library unless it is there. Raises RuntimeError with the compiler's text when that fails."""
    path = library_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _compile(path)
    return path


@cache
def is_loaded() -> bool:
    """Builds and loads the library on the first call; False when it cannot be had."""
    try:
        torch.ops.load_library(build())
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("operators run in plain torch, which is slower: they could not be compiled (%s)", reason)
        return False
    return True


def _compile(path: Path) -> None:
    from torch.utils import cpp_extension

    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise RuntimeError("no C++ compiler: install g++ or set CXX")
    logger.info("compiling the operators into %s; this takes about a minute, once", path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        cpp_extension.load(
            _NAME,
            [str(source) for source in _cpu_sources()],
            extra_cflags=list(_FLAGS),
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        # Renamed only when whole: a process that was cut off leaves nothing that another one would load.
        os.replace(Path(folder) / f"{_NAME}.so", path)


def _cpu_sources() -> list[Path]:
    return [_SOURCES / "binding.cpp", *sorted((_SOURCES / "cpu").glob("*.cpp"))]


def _fingerprint() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {platform.machine()} {_processor()}".encode())
    for source in sorted(_SOURCES.rglob("*")):
        if source.is_file():
            digest.update(source.read_bytes())
    digest.update(" ".join(_FLAGS).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
