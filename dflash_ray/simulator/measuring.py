"""A profile of this machine: the target's engine and the drafter in it, alone, over rows, sequences and contexts.

Steps are those that a router sends, with drafts that are all wrong: what a pass takes does not depend on that.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from dflash_ray.config import DflashRayConfig
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.sampling.parameters import SamplingParams
from dflash_ray.simulator.profile import Profile, Times
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.step import Drafts, Opening, StepInput, StepOutput, chain_parents
from dflash_ray.training.config import EngineSection
from dflash_ray.training.decoding import local_engine

_ROUNDS = 5
_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)  # of one sequence
_SEQUENCES = (1, 2, 4, 8, 16)
_SHORT, _LONG = 16, 768  # tokens of context
_PREFILLS = (16, 64, 256)
_TOKEN = 1  # what every sequence says


class _Bench:
    """Sequences in an engine, and the times of steps over them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next_id = 1
        self.lens: dict[int, int] = {}

    def open(self, count: int, num_tokens: int, drafts: int) -> list[float]:
        """Prefills so many sequences, one after the other; returns the seconds of each."""
        times = []
        for _ in range(count):
            sequence_id, self._next_id = self._next_id, self._next_id + 1
            tokens = np.arange(3, 3 + num_tokens, dtype=np.int64)
            opening = Opening(sequence_id, tokens, num_tokens, 1 << 20, sampling=SamplingParams(), wants_features=True)
            began = time.perf_counter()
            self._run(
                StepInput(
                    open=[opening],
                    prefill_ids=np.array([sequence_id], np.uint64),
                    prefill_lens=np.array([num_tokens], np.int64),
                    draft_ids=np.array([sequence_id] if drafts else [], np.uint64),
                    draft_counts=np.array([drafts] if drafts else [], np.int64),
                )
            )
            times.append(time.perf_counter() - began)
            self.lens[sequence_id] = num_tokens + 1
        return times

    def close(self) -> None:
        self._engine.close(list(self.lens))
        self.lens = {}

    def step(self, num_drafts: int, num_asked: int = 0) -> tuple[float, float]:
        """One pass over all sequences: seconds of the pass, and of the drafter behind it."""
        ids, lens = np.array(list(self.lens), np.uint64), np.array(list(self.lens.values()), np.int64)
        counts = np.full(len(ids), num_drafts)
        asked = ids if num_asked else ids[:0]
        began = time.perf_counter()
        output = self._run(
            StepInput(
                verify_ids=ids,
                base_lens=lens,
                drafts=Drafts(counts, np.full(int(counts.sum()), _TOKEN), chain_parents(counts)),
                draft_ids=asked,
                draft_counts=np.full(len(asked), num_asked),
            )
        )
        seconds = time.perf_counter() - began
        for sequence_id, count in zip(self.lens, output.num_tokens.tolist(), strict=True):
            self.lens[sequence_id] += count
        return seconds - output.draft_ns / 1e9, output.draft_ns / 1e9

    def _run(self, step: StepInput) -> StepOutput:
        return self._engine.step(step)

    def pass_seconds(self, num_drafts: int) -> float:
        return median(self.step(num_drafts)[0] for _ in range(_ROUNDS))

    def draft_seconds(self, num_asked: int) -> float:
        return median(self.step(0, num_asked)[1] for _ in range(_ROUNDS))


def measure(config: DflashRayConfig, on_step: Callable[[str], None]) -> Profile:
    """Runs the grid; a minute or two on a small machine.

    Args:
        on_step: told what is measured now.
    """
    on_step("loading target and drafter")
    target = resolve_target(config.model.path)
    drafter = resolve_drafter(config.drafter.path, target) if config.uses_features else None
    settings = EngineSection(
        device=config.target.device,
        num_threads=config.target.num_threads,
        dtype=config.model.dtype,
        max_model_len=min(config.model.max_model_len, 2048),
        kv_cache_tokens=max(_SEQUENCES) * 2048,
        max_batch_tokens=config.target.max_batch_tokens,
    )
    with local_engine(config.model.path, settings, drafter=drafter) as (engine, limits):
        bench = _Bench(engine)
        draft_len = drafter.config.block_size - 1 if drafter is not None else 7
        bench.open(1, _SHORT, 0)
        bench.step(0)
        on_step("passes of one sequence")
        rows = [bench.pass_seconds(count - 1) for count in _ROWS]
        bench.close()
        on_step("prompts")
        prefills = [median(bench.open(3, count, 0)) for count in _PREFILLS]
        bench.close()
        on_step("passes of many sequences, and drafts")
        plain, drafts = [], []
        for count in _SEQUENCES:
            bench.open(count, _SHORT, draft_len if drafter is not None else 0)
            plain.append(bench.pass_seconds(0))
            drafts.append(bench.draft_seconds(draft_len) if drafter is not None else 0.0)
            bench.close()
        on_step("long contexts")
        bench.open(4, _LONG, 0)
        long = bench.pass_seconds(0)
        bench.close()
    by_rows = Times(at=_ROWS, seconds=tuple(np.maximum.accumulate(rows).tolist()))
    extra = [seconds - by_rows(count) for count, seconds in zip(_SEQUENCES, plain, strict=True)]
    per_sequence = max(0.0, median(e / (count - 1) for e, count in zip(extra[1:], _SEQUENCES[1:], strict=True)))
    per_token = max(0.0, (long - plain[_SEQUENCES.index(4)]) / (4 * (_LONG - _SHORT)))
    return Profile(
        name=f"{platform.node()}-{config.model.served_name}",
        model=config.model.path,
        device=f"{os.cpu_count()} cores" if config.target.device == "cpu" else config.target.device,
        date=datetime.date.today().isoformat(),
        source=f"measured by dflash-ray profile, medians of {_ROUNDS} steps of the engine alone",
        passes=by_rows,
        per_sequence=per_sequence,
        per_context_token=per_token,
        prefill=Times(at=_PREFILLS, seconds=tuple(np.maximum.accumulate(prefills).tolist())),
        drafts=Times(at=_SEQUENCES, seconds=tuple(np.maximum.accumulate(drafts).tolist())),
        draft_len=draft_len,
        shares_cores=config.target.device == "cpu",
        max_batch_tokens=limits.max_batch_tokens,
        kv_cache_tokens=config.target.kv_cache_tokens,
        max_model_len=min(config.model.max_model_len, 8192),
    )


def default_path(profile: Profile) -> Path:
    """Where a profile of this machine and model lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "dflash_ray" / "profiles" / f"{profile.name.replace('/', '_')}.json"
