"""Builds other than the one in use: with sanitizers, and for GPUs that are not here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_ray.kernels import build, cuda_report

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: CUDA kernels cannot be compiled here")
SANITIZED = "-g -O1 -mavx2 -mfma -mf16c -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"


def _compiler(folder: Path) -> Path:
    """g++ without what is loaded into everything else: it takes several times as long under a sanitizer's malloc."""
    script = folder / "g++"
    script.write_text('#!/bin/sh\nunset LD_PRELOAD\nexec g++ "$@"\n')
    script.chmod(0o755)
    return script


def _library(name: str) -> str:
    """Where g++ has it."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_cpu_operators_run_clean_under_sanitizers(tmp_path):
    # The C++ runtime beside it, or the sanitizer finds no exceptions to intercept: the interpreter itself has none.
    libraries = [_library(name) for name in ("libasan.so", "libstdc++.so.6")]
    environment = os.environ | {
        build.FLAGS_ENV: SANITIZED,
        build.CACHE_ENV: str(tmp_path),
        "CXX": str(_compiler(tmp_path)),
        "OMP_NUM_THREADS": "1",  # waiting threads spin, which sanitizers make very slow
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own are no fault of the operators
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    names = (
        "test_verify.py",
        "test_forward.py",
        "test_history.py",
        "test_packing.py",
        "../target_group/test_lean_decoder.py",
    )
    tests = [str(Path(__file__).parent / name) for name in names]
    # Nothing is captured (-s): a process that a sanitizer ends takes what pytest has caught with it.
    # With these flags no multiplication is fused with its addition, and the sanitizer holds freed memory back.
    left_out = "not emulated and not warning and not fused and not used_again"
    options = ["-q", "-s", "-p", "no:cacheprovider", "-k", left_out]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run([*command, *tests], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_no_two_sources_of_a_library_share_a_name_for_their_object():
    sources = [build.SOURCES / source for source in (*build._CPU_SOURCES, *build._CUDA_SOURCES)]
    objects = {
        source.stem + (".cuda.o" if source.suffix == ".cu" else ".o") for source in sources
    }  # as torch names them
    assert len(objects) == len(sources)
    assert all(source.is_file() for source in sources)


@pytest.mark.slow
@needs_nvcc
def test_the_cuda_kernels_compile_without_spills_and_within_their_budget():
    report = cuda_report.compile_report()
    assert cuda_report.faults(report) == []
    committed = cuda_report.load_report()
    if committed["compiler"] == report["compiler"]:
        assert {key: committed[key] for key in report} == report, "run: dflash-ray kernels report --write"


@needs_nvcc
def test_the_cuda_binding_is_valid_against_torchs_headers(tmp_path):
    from torch.utils import cpp_extension

    # torch's CPU wheel has its CUDA headers but for this one, which its build generates.
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.write_text("#pragma once\n")
    includes = [f"-I{folder}" for folder in (tmp_path, *cpp_extension.include_paths())]
    source = build.SOURCES / "cuda" / "cuda_binding.cpp"
    check = ["nvcc", "-std=c++20", "-Xcompiler", "-fsyntax-only", *includes, "-c", source, "-o", tmp_path / "binding.o"]
    subprocess.run(check, check=True)
