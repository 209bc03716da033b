"""Plain decoding on one rank against `transformers` `generate`, interleaved in one run, and the cost of more rows.

`python benchmarks/plain_decode.py`: SmolLM2 in fp32, one sequence, all cores. Prints figures; asserts nothing.
"""

from __future__ import annotations

import os
import statistics
import time

import numpy as np
import torch

from dflash_ray.config import load_config
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.tensor_parallel import create_store, init_process_group

CONTEXT, TOKENS, ROUNDS = 128, 24, 5
ROWS = (1, 2, 4, 5, 8)


def step(token_ids: list[int], context_len: int, page_size: int) -> StepBatch:
    """One entry of consecutive rows after `context_len` rows, on pages 0, 1, ..."""
    count = len(token_ids)
    pages = np.arange(-(-(context_len + count) // page_size))
    at = np.arange(context_len, context_len + count)
    one = np.array
    return StepBatch(
        one(token_ids),
        at,
        at,
        one([count]),
        one([context_len]),
        one([len(pages)]),
        pages,
        np.arange(count),
        one([], int),
    )


def seconds_per_token_of_transformers(model: torch.nn.Module, ids: torch.Tensor) -> float:
    def run(count: int) -> float:
        started = time.perf_counter()
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - started

    return (run(TOKENS + 1) - run(1)) / TOKENS


def seconds_per_pass(model: RankModel, rows: int, page_size: int) -> float:
    started = time.perf_counter()
    for i in range(TOKENS):
        model.rank_logits(model.forward(step([5] * rows, CONTEXT + i, page_size)).sampled).argmax(-1)
    return (time.perf_counter() - started) / TOKENS


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    config = load_config(None)
    checkpoint = resolve_target(config.model.path)
    reference = checkpoint.load_model()
    init_process_group(create_store("127.0.0.1", 1, 60), 0, 1, "cpu", True, 0)
    model = RankModel(checkpoint, config, 0, 1)
    page_size = config.target.page_size
    ids = torch.randint(100, 40000, (1, CONTEXT))
    model.forward(step(ids[0].tolist(), 0, page_size))
    theirs, ours = [], []
    for _ in range(ROUNDS):
        theirs.append(seconds_per_token_of_transformers(reference, ids))
        ours.append(seconds_per_pass(model, 1, page_size))
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    print(f"transformers generate {statistics.median(theirs) * 1e3:6.1f} ms a token")
    print(f"one rank, 1 row       {statistics.median(ours) * 1e3:6.1f} ms a token, {ratio:.2f}x")
    for rows in ROWS[1:]:
        print(f"one rank, {rows} rows      {seconds_per_pass(model, rows, page_size) * 1e3:6.1f} ms a pass")


if __name__ == "__main__":
    main()
