"""The CUDA kernels under emulation: a library that only tests want."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

from dflash_ray.kernels import build
from dflash_ray.kernels.fakes import (
    register_attention_fake,
    register_draft_fakes,
    register_layer_fakes,
    register_verify_fakes,
)

CUDA = build.SOURCES / "cuda"
EMULATED = (
    CUDA / "attention.cu",
    CUDA / "drafts.cu",
    CUDA / "layer.cu",
    CUDA / "verify.cu",
    CUDA / "emulated_binding.cpp",
)


def compile_shared(name: str, sources: tuple[Path, ...], flags: tuple[str, ...]) -> Path:
    """A shared library of C++ sources (.cu files as C++), cached like the product's own."""
    digest = hashlib.sha256(" ".join([torch.__version__, *map(str, sources), *flags]).encode())
    for source in sorted(build.SOURCES.rglob("*")):
        if source.is_file():
            digest.update(source.read_bytes())
    path = build.cache_dir() / f"{name}-{digest.hexdigest()[:16]}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            partial = path.with_suffix(".partial")
            includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
            libraries = [f"-L{cpp_extension.library_paths()[0]}", "-ltorch", "-ltorch_cpu", "-lc10"]
            command = ["g++", "-shared", "-fPIC", "-std=c++20", *flags, *includes, "-x", "c++", *map(str, sources)]
            subprocess.run([*command, "-o", str(partial), *libraries], check=True)
            partial.replace(path)
    return path


@cache
def load_emulated() -> None:
    """torch.ops.dflash_ray_emulated: the CUDA kernels on CPU tensors."""
    torch.ops.load_library(compile_shared("dflash_ray_emulated", EMULATED, ("-O2", "-Wall", "-Wno-unknown-pragmas")))
    register_verify_fakes("dflash_ray_emulated")
    register_layer_fakes("dflash_ray_emulated")
    register_draft_fakes("dflash_ray_emulated")
    register_attention_fake("dflash_ray_emulated")
