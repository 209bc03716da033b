"""Compiles the operators once and loads them into torch.

The library is cached under a name made of its sources, torch and the processor, so a second process only loads it.
Where there is no compiler the plain torch functions of `reference` stand in, with one warning.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import tempfile
from functools import cache
from pathlib import Path

import torch

from dflash_ray.core.libraries import CACHE_ENV as CACHE_ENV
from dflash_ray.core.libraries import cache_dir as cache_dir
from dflash_ray.core.libraries import compiled_once, compiler
from dflash_ray.kernels.fakes import (
    register_attention_fake,
    register_draft_fakes,
    register_forward_fakes,
    register_layer_fakes,
    register_verify_fakes,
)

logger = logging.getLogger(__name__)
FLAGS_ENV = "DFLASH_RAY_KERNEL_FLAGS"
SOURCES = Path(__file__).parent / "csrc"
# No two C++ files share a name: torch names the objects of a library by it, whatever their folders are.
_CPU_SOURCES = (
    "binding.cpp",
    "cpu/choice.cpp",
    "cpu/contexts.cpp",
    "cpu/decoder.cpp",
    "cpu/drafts.cpp",
    "cpu/forward.cpp",
    "cpu/history.cpp",
    "cpu/linear.cpp",
    "cpu/packing.cpp",
    "cpu/team.cpp",
    "cpu/verify.cpp",
)
_CUDA_SOURCES = ("cuda/attention.cu", "cuda/cuda_binding.cpp", "cuda/drafts.cu", "cuda/layer.cu", "cuda/verify.cu")
_NAME = "dflash_ray_kernels"
_FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wall")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# No fused multiply-adds but those that are written: the CPU's and the GPU's arithmetic are to be the same.
CUDA_FLAGS = ("-O3", "-std=c++20", "--fmad=false")


def library_path(with_cuda: bool) -> Path:
    """Where the library for this machine is, or would be after `build`."""
    return cache_dir() / _fingerprint(with_cuda) / f"{_NAME}.so"


def build() -> Path:
    """Compiles the library unless it is there. Raises RuntimeError with the compiler's text when that fails."""
    return compiled_once(library_path(_has_cuda()), _compile)


def is_loaded_for(device_type: str) -> bool:
    """Builds and loads the library on the first call; whether it has the operators for "cpu" or "cuda"."""
    return device_type in _loaded_devices()


@cache
def _loaded_devices() -> tuple[str, ...]:
    try:
        torch.ops.load_library(build())
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("operators run in plain torch, which is slower: they could not be compiled (%s)", reason)
        return ()
    register_verify_fakes("dflash_ray")
    register_layer_fakes("dflash_ray")
    register_draft_fakes("dflash_ray")
    register_forward_fakes()
    register_attention_fake("dflash_ray")
    return ("cpu", "cuda") if _has_cuda() else ("cpu",)


def _compile(path: Path) -> None:
    compiler()
    logger.info("compiling the operators into %s; this takes a minute or two, once", path.parent)
    sources = _CPU_SOURCES + (_CUDA_SOURCES if _has_cuda() else ())
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        cpp_extension.load(
            path.stem,
            [str(SOURCES / source) for source in sources],
            extra_cflags=[*_FLAGS, *_machine_flags()],
            extra_cuda_cflags=[*CUDA_FLAGS, *_architecture_flags()],
            extra_ldflags=["-fopenmp", *(flag for flag in _machine_flags() if flag.startswith("-fsanitize"))],
            build_directory=folder,
            is_python_module=False,
        )
        # Renamed only when whole: a process that was cut off leaves nothing that another one would load.
        os.replace(Path(folder) / path.name, path)


def _has_cuda() -> bool:
    """Whether the library has CUDA operators: torch does, and they are compiled already or their compiler is here."""
    from torch.utils import cpp_extension

    return torch.version.cuda is not None and (cpp_extension.CUDA_HOME is not None or library_path(True).exists())


def _machine_flags() -> list[str]:
    """Flags of $DFLASH_RAY_KERNEL_FLAGS, or this processor's own; an image names those of the machines it runs on."""
    return os.environ.get(FLAGS_ENV, "-march=native").split()


def _architecture_flags() -> list[str]:
    """Code for all architectures where no GPU is at hand, as in an image build; else torch chooses this GPU's.

    torch reads $TORCH_CUDA_ARCH_LIST first.
    """
    if torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ:
        return []
    return [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in ARCHITECTURES]


def _fingerprint(with_cuda: bool) -> str:
    machine = _machine_flags()
    processor = _processor() if "-march=native" in machine else ""
    digest = hashlib.sha256(f"{torch.__version__} {platform.machine()} {processor} {machine}".encode())
    for source in sorted(SOURCES.rglob("*")):
        if source.is_file():
            digest.update(source.read_bytes())
    digest.update(" ".join((*_FLAGS, *CUDA_FLAGS, str(with_cuda))).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
