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

import torch

from dflash_ray.config import load_config
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.pb import common_pb2, target_pb2
from dflash_ray.sampling.shards import SingleShard
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.tensor_parallel import StepChannel, create_store, init_process_group

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
    runner = GroupRunner(rank, StepChannel("cpu"), SingleShard())
    store = FeatureStore(config.target.kv_cache_rows, drafter.config.hidden_size, torch.float32)
    sizes = config.target.num_pages, config.target.page_size, rank.max_model_len, rank.vocab_size
    return Engine(runner, *sizes, features=store), store


def opening(sequence_id: int, max_new_tokens: int) -> target_pb2.OpenSequence:
    return target_pb2.OpenSequence(
        sequence_id=sequence_id,
        token_ids=[(sequence_id * 7919 + at * 104729) % 40_000 for at in range(PROMPT)],
        prompt_len=PROMPT,
        sampling=common_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0),
        stopping=common_pb2.StoppingParams(max_new_tokens=max_new_tokens),
        wants_features=True,
    )


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
        step = target_pb2.Step(close=closing)
        for sequence_id, length in lens.items():
            step.verify_ids.append(sequence_id)
            step.base_lens.append(length)
            step.num_drafts.append(0)
        while len(lens) < RUNNING:
            sequence_id = next(ids)
            step.open.append(opening(sequence_id, 4000 if sequence_id == LONG else NEW))
            step.prefill_ids.append(sequence_id)
            step.prefill_lens.append(PROMPT)
            lens[sequence_id] = PROMPT
        result = engine.step(step).result
        num_steps += 1
        for sequence_id, count in zip(result.sequence_ids, result.num_tokens, strict=True):
            lens[sequence_id] += count
        closing = [
            sequence_id
            for sequence_id, reason in zip(result.sequence_ids, result.finish_reasons, strict=True)
            if reason
        ]
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
