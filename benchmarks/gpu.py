"""What the application does on a GPU, beside what one H100 gave on 2026-11-26 (commit d42a36e) and what is aimed at.

    python benchmarks/gpu.py --json gpu.json     # on a GPU, at most 8 minutes
    python benchmarks/gpu.py --tiny              # the same code on a CPU with tiny random models, within a minute

An "8B" is a target of Qwen3-8B's shape with random weights in bfloat16, its drafter one of the published DFlash shape:
random weights take the time of real ones, and accept nothing. The application serves SmolLM2. Prints figures, asserts
nothing; a part that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_application import application
from gpu_engine import GPU, TINY, EngineBench

Figures = Iterator[tuple[str, float]]
# Measured then (two figures where two were given), and what is aimed at.
KNOWN = {
    "copy, TB/s": ("2.89", ""),
    "weights read a step, GB": ("15.14", ""),
    "floor of a step, ms": ("5.24", ""),
    "step, 1 x 1 rows, ms": ("53", "6.3"),
    "step, 1 x 1 rows, not exact, ms": ("53", "6.3"),
    "step, 1 x 8 rows, ms": ("52", "6.3"),
    "step, 1 x 8 rows, not exact, ms": ("52", "6.3"),
    "step, 1 x 16 rows, ms": ("76", "6.3"),
    "step, 1 x 16 rows, not exact, ms": ("76", "6.3"),
    "step, 32 x 1 rows, ms": ("66", "7"),
    "step, 32 x 1 rows, not exact, ms": ("66", "7"),
    "step, 32 x 8 rows, ms": ("72", "9"),
    "step, 32 x 8 rows, not exact, ms": ("72", "9"),
    "prefill of 2048 tokens, ms": ("158", "50"),
    "prefill of 2048 tokens, not exact, ms": ("158", "50"),
    "propose, 1 sequences, ms": ("6.6", ""),
    "propose, 8 sequences, ms": ("24.3", ""),
    "propose, 32 sequences, ms": ("76.5", ""),
    "extend by 4 rows, 1 sequences, ms": ("1.4", ""),
    "extend by 4 rows, 8 sequences, ms": ("7.8", ""),
    "extend by 4 rows, 32 sequences, ms": ("22.3", ""),
    "propose + extend, 1 sequences, ms": ("8", "1.6"),
    "propose + extend, 8 sequences, ms": ("32", "1.8"),
    "propose + extend, 32 sequences, ms": ("99", "2.5"),
    "verification against argmax, greedy": ("1.1-1.4", "1.2"),
    "verification against argmax, coupled": ("5-6", "1.5"),
    "verification against argmax, coupled, top-p 0.95": ("20-71", "3"),
    "verification against argmax, coupled, top-k 50": ("20-71", "3"),
    "verification against argmax, rejection": ("7-9", "2"),
    "texts with drafts that differ, of 64 of 256 tokens": ("not measured", "0"),
    "texts with drafts that differ, of 64 of 256 tokens, not exact": ("not measured", ""),
    "application, 1 clients, off, tokens/s": ("24.3", "400"),
    "application, 1 clients, on, tokens/s": ("45.2", "800"),
    "application, 8 clients, off, tokens/s": ("180", ""),
    "application, 8 clients, on, tokens/s": ("211", ""),
    "application, 32 clients, off, tokens/s": ("667", ""),
    "application, 32 clients, on, tokens/s": ("461", ""),
}
PARTS = ("floor", "steps", "prefill", "drafts", "verification", "equality", "application")


def measure(parts: list[str], is_tiny: bool) -> dict[str, object]:
    """Runs the parts in order and prints their figures as they come."""
    scale = TINY if is_tiny else GPU
    engine_parts = [part for part in parts if part != "application"]
    runs: dict[str, Callable[[], Figures]] = {}
    if engine_parts:
        bench = EngineBench(scale)
        runs = {part: getattr(bench, part) for part in engine_parts}
    if "application" in parts:
        loads, max_tokens = ((1, 2), 8) if is_tiny else ((1, 8, 32), 64)
        runs["application"] = lambda: application(scale.device, loads, max_tokens)
    figures: dict[str, float] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for part, run in runs.items():
        began = time.perf_counter()
        try:
            for name, value in run():
                figures[name] = value
                then, aim = KNOWN.get(name, ("", "")) if not is_tiny else ("", "")
                print(f"| {name} | {value:.4g} | {then} | {aim} |", flush=True)
        except Exception as error:
            failed[part] = repr(error)
            traceback.print_exc()
            print(f"| {part} | failed | | |", flush=True)
        seconds[part] = time.perf_counter() - began
    return {"figures": figures, "failed": failed, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny random models on a CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    device = "CPU" if options.tiny else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}\n\n| | now | 2026-11-26 | aim |\n|---|---|---|---|", flush=True)
    result = measure(parts, options.tiny)
    if options.json is not None:
        options.json.write_text(json.dumps({"device": device, "torch": torch.__version__, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
