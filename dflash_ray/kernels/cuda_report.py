"""What the CUDA kernels need of a GPU, as their compiler says it: registers, spills and shared memory.

Compiles without a GPU. The committed report is csrc/cuda/report.json: a budget of registers for each kernel, and the
figures of each architecture with the compiler that gave them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from dflash_ray.kernels.build import ARCHITECTURES, CUDA_FLAGS, SOURCES

REPORT = SOURCES / "cuda" / "report.json"
_HEADROOM = 8  # registers of the budget above today's figures


def compile_report() -> dict[str, Any]:
    """Compiles for every architecture: {"compiler": str, architecture: {kernel: {"registers", "spill_bytes", ...}}}.

    Raises RuntimeError with the compiler's text when it fails, or when there is no nvcc.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on PATH: the CUDA toolkit is needed to compile the CUDA kernels")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    report: dict[str, Any] = {"compiler": f"nvcc {re.findall(r'V([0-9.]+)', version)[0]}"}
    for architecture in ARCHITECTURES:
        report[architecture] = {}
        for source in sorted((SOURCES / "cuda").glob("*.cu")):
            report[architecture] |= _parse(_compile(nvcc, architecture, source))
    return report


def _compile(nvcc: str, architecture: str, source: Path) -> str:
    """What the compiler says of a source's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*CUDA_FLAGS, f"-arch={architecture}", "-Xptxas", "-v"]
        command = [nvcc, *flags, "-c", str(source), "-o", str(Path(folder) / "kernels.o")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr


def _parse(text: str) -> dict[str, dict[str, int]]:
    kernels: dict[str, dict[str, int]] = {}
    for part in text.split("Compiling entry function '")[1:]:
        mangled = part.split("'")[0]
        name = re.findall(r"\d([a-z_]+_kernel)", mangled)[0]
        kind = next((kind for kind in ("Bfloat16", "Float16") if kind in mangled), "float" if "If" in mangled else "")
        arguments = [kind.lower()] if kind else []
        arguments += re.findall(r"Li(\d+)E", mangled)
        kernels[f"{name}<{', '.join(arguments)}>" if arguments else name] = {
            "registers": sum(map(int, re.findall(r"Used (\d+) registers", part))),
            "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", part))),
            "shared_bytes": sum(map(int, re.findall(r"(\d+) bytes smem", part))),
        }
    return kernels


def load_report() -> dict[str, Any]:
    """The committed report."""
    report: dict[str, Any] = json.loads(REPORT.read_text())
    return report


def write_report(report: dict[str, Any]) -> None:
    """Commits a report; budgets of kernels that are known already stay."""
    budgets = load_report()["register_budget"] if REPORT.exists() else {}
    most: dict[str, int] = {}
    for architecture in ARCHITECTURES:
        for kernel, figures in report[architecture].items():
            most[kernel] = max(most.get(kernel, 0), figures["registers"])
    report = {"register_budget": {k: budgets.get(k, most[k] + _HEADROOM) for k in sorted(most)}, **report}
    REPORT.write_text(json.dumps(report, indent=1) + "\n")


def faults(report: dict[str, Any]) -> list[str]:
    """Kernels that spill or use more registers than their budget allows."""
    budgets = load_report()["register_budget"]
    lines = []
    for architecture in ARCHITECTURES:
        for kernel, figures in report[architecture].items():
            if figures["spill_bytes"]:
                lines.append(f"{kernel} on {architecture} spills {figures['spill_bytes']} bytes")
            if figures["registers"] > budgets.get(kernel, 0):
                lines.append(
                    f"{kernel} on {architecture} uses {figures['registers']} registers of {budgets.get(kernel, 0)}"
                )
    return lines
