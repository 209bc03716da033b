"""Packed linear layers against torch's own on CPU, in turns, for the shapes of SmolLM2 and ever more rows.

`python benchmarks/linear.py`: float32, all cores, GFLOP/s of the best of several runs. Prints figures; asserts nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dflash_ray.models.packed_linear import PackedLinear

SHAPES = {"gate and up": (576, 3072), "down": (1536, 576), "query, key, value": (576, 960)}
ROWS = (1, 3, 6, 9, 32, 128, 512)
ROUNDS, FLOP_A_RUN = 10, 3e8


def gflops(layer: Callable[[Tensor], Tensor], x: Tensor, flop: float) -> float:
    count = max(1, int(FLOP_A_RUN / flop))
    started = time.perf_counter()
    for _ in range(count):
        layer(x)
    return flop * count / (time.perf_counter() - started) / 1e9


def main() -> None:
    print(f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
    print(f"{'layer':20} {'rows':>5} {'packed':>8} {'torch':>8} GFLOP/s")
    for name, (inputs, outputs) in SHAPES.items():
        plain = nn.Linear(inputs, outputs, bias=False)
        layers = (PackedLinear(plain.weight), plain)
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            flop = 2.0 * rows * inputs * outputs
            runs = [[gflops(layer, x, flop) for layer in layers] for _ in range(ROUNDS)]
            packed, torchs = map(max, zip(*runs, strict=True))
            print(f"{name:20} {rows:5} {packed:8.0f} {torchs:8.0f}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
