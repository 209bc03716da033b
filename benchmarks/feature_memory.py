"""Memory of a target that keeps context features: many short requests beside one long one.

`python benchmarks/feature_memory.py`: SmolLM2 with the taps and fc of its drafter, one rank, no router. 64 sequences
run at a time, one of them throughout. Prints resident memory as requests finish; asserts nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os
import time
from collections.abc import Iterable

import numpy as np
import torch

from dflash_ray.config import load_config
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.step import Drafts, Opening, StepInput
from dflash_ray.target_group.tensor_parallel import create_store, init_process_group

LONG, RUNNING, PROMPT, NEW = 0, 64, 8, 4


def resident_mib() -> float:
    """Of this process, without what it has freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def build_engine() -> tuple[Engine, FeatureStore]:
    config = load_config(None)
    target = resolve_target(config.model.path)
    drafter = resolve_drafter(config.drafter.path, target)
    projector = drafter.build_projector(torch.float32)
    rank = RankModel(target, config, 0, 1, projector, drafter.config.target_layer_ids)
    runner = GroupRunner(rank, SingleRank())
    store = FeatureStore(config.target.kv_cache_rows, drafter.config.hidden_size, torch.float32)
    sizes = config.target.num_pages, config.target.page_size, rank.max_model_len
    return Engine(runner, *sizes, features=store), store


def opening(sequence_id: int, max_new_tokens: int) -> Opening:
    token_ids = (sequence_id * 7919 + np.arange(PROMPT) * 104729) % 40_000
    return Opening(sequence_id, token_ids, PROMPT, max_new_tokens, wants_features=True)


def ids_of(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.uint64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    num_requests = parser.parse_args().requests
    init_process_group(create_store("127.0.0.1", 1, 60), 0, 1, "cpu", True, 0)
    engine, store = build_engine()
    lens: dict[int, int] = {}
    ids = itertools.count(LONG)
    num_done = num_steps = 0
    closing: list[int] = []
    started = time.perf_counter()
    while num_done < num_requests:
        known = dict(lens)
        opened = []
        while len(lens) < RUNNING:
            sequence_id = next(ids)
            opened.append(opening(sequence_id, 4000 if sequence_id == LONG else NEW))
            lens[sequence_id] = PROMPT
        step = StepInput(
            close=ids_of(closing),
            open=opened,
            prefill_ids=ids_of(one.sequence_id for one in opened),
            prefill_lens=np.full(len(opened), PROMPT),
            verify_ids=ids_of(known),
            base_lens=np.fromiter(known.values(), dtype=np.int64),
            drafts=Drafts(counts=np.zeros(len(known), dtype=np.int64)),
        )
        output = engine.step(step)
        if output.features is not None:
            engine.keep_features(output.features)
        num_steps += 1
        closing = []
        columns = (output.sequence_ids, output.num_tokens, output.finishes)
        for sequence_id, count, finish in zip(*(column.tolist() for column in columns), strict=True):
            lens[sequence_id] += count
            if finish:
                closing.append(sequence_id)
        for sequence_id in closing:
            del lens[sequence_id]
        before, num_done = num_done, num_done + len(closing)
        if num_steps == 5 or num_done // 250 > before // 250:
            print(
                f"{num_done:5} requests  {num_steps:5} steps  {time.perf_counter() - started:6.1f} s  "
                f"resident {resident_mib():7.1f} MiB  store at most {store.num_bytes / 2**20:.1f} MiB",
                flush=True,
            )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
