"""A profile of this machine: the target's engine and the drafter in it, alone, over rows, sequences and contexts.

Steps are those that a router sends, with drafts that are all wrong: what a pass takes does not depend on that.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from functools import partial
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

_ROUNDS = 9
_ENOUGH_S = 2.0  # of one measurement, after which a busy machine gets no further round
_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)  # of one sequence
_SEQUENCES = (1, 2, 4, 8, 16)
_MANY = 8  # sequences
_ROWS_OF_MANY = (24, 32, 64)  # of all of them
_FEW_SLOTS = 3  # of a draft, to tell what a slot takes
_SHORT, _LONG = 16, 256  # tokens of context
_LONG_SEQUENCES = 2
_PREFILLS = (16, 64, 256)
_TOKEN = 1  # what every sequence says


class _Bench:
    """Sequences in an engine, and the times of steps over them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next_id = 1
        self.lens: dict[int, int] = {}

    def open(self, count: int, num_tokens: int, features: bool = False) -> float:
        """Prefills so many sequences in one pass; returns its seconds."""
        tokens = np.arange(3, 3 + num_tokens, dtype=np.int64)
        ids = np.arange(self._next_id, self._next_id + count).astype(np.uint64)
        self._next_id += count
        began = time.perf_counter()
        self._run(
            StepInput(
                open=[
                    Opening(int(i), tokens, num_tokens, 1 << 20, sampling=SamplingParams(), wants_features=features)
                    for i in ids
                ],
                prefill_ids=ids,
                prefill_lens=np.full(count, num_tokens),
            )
        )
        self.lens |= dict.fromkeys(ids.tolist(), num_tokens + 1)
        return time.perf_counter() - began

    def close(self) -> None:
        self._engine.close(list(self.lens))
        self.lens = {}

    def step(self, num_drafts: int, num_asked: int = 0) -> float:
        """One pass over all sequences, and the drafter behind it; returns its seconds."""
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
        return seconds

    def _run(self, step: StepInput) -> StepOutput:
        return self._engine.step(step)

    def seconds(self, num_drafts: int = 0, num_asked: int = 0) -> float:
        return _median(lambda: self.step(num_drafts, num_asked))

    def cores(self, num_asked: int = 0) -> float:
        """That steps keep busy."""
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(_ROUNDS):
            self.step(0, num_asked)
        return max(0.1, (time.process_time() - worked) / (time.perf_counter() - began))


def _median(measure: Callable[[], float]) -> float:
    """Of a few rounds; of fewer where they take long."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _ROUNDS and (not times or time.perf_counter() - began < _ENOUGH_S):
        times.append(measure())
    return median(times)


def measure(config: DflashRayConfig, on_step: Callable[[str], None]) -> Profile:
    """Runs the grid; half a minute on a small machine, two where others are at work too.

    Args:
        on_step: told what is measured now.
    """
    on_step("loading target and drafter")
    target = resolve_target(config.model.path)
    drafter = resolve_drafter(config.drafter.path, target) if config.uses_features else None
    settings = EngineSection(
        device=config.target.device,
        num_threads=config.target.num_threads or os.cpu_count() or 1,  # as a rank has, whatever OMP_NUM_THREADS says
        dtype=config.model.dtype,
        max_model_len=min(config.model.max_model_len, 2048),
        kv_cache_tokens=max(_SEQUENCES) * 2048,
        max_batch_tokens=config.target.max_batch_tokens,
    )
    with local_engine(config.model.path, settings, drafter=drafter) as (engine, limits):
        bench = _Bench(engine)
        draft_len = drafter.config.block_size - 1 if drafter is not None else 7
        bench.open(1, _SHORT)
        bench.step(0)
        on_step("passes of one sequence")
        rows, pass_cores = [bench.seconds()], bench.cores()
        bench.close()
        bench.open(1, _SHORT, features=drafter is not None)
        rows += [bench.seconds(count - 1) for count in _ROWS[1:]]
        bench.close()
        on_step("prompts")
        prefills = [_median(partial(bench.open, 1, count)) for count in _PREFILLS]
        bench.close()
        on_step("passes of many sequences, and drafts")
        plain, drafts, slots, draft_cores = [], [], [0.0], 1.0
        for count in _SEQUENCES:
            bench.open(count, _SHORT)
            plain.append(bench.seconds())
            bench.close()
            if drafter is None:
                continue
            bench.open(count, _SHORT, features=True)
            none, few, many = (bench.seconds(0, asked) for asked in (0, _FEW_SLOTS, draft_len))
            drafts.append(many - none)
            slots.append((many - few) / (count * max(1, draft_len - _FEW_SLOTS)))
            draft_cores = bench.cores(draft_len)
            bench.close()
        bench.open(_MANY, _SHORT, features=drafter is not None)
        of_many = [bench.seconds(count // _MANY - 1) for count in _ROWS_OF_MANY]
        bench.close()
        on_step("long contexts")
        for _ in range(_LONG_SEQUENCES):
            bench.open(1, _LONG)
        long = bench.seconds()
        bench.close()
    of_one = Times(at=_ROWS, seconds=tuple(np.maximum.accumulate(rows).tolist()))
    extra = [seconds - of_one(count) for count, seconds in zip(_SEQUENCES, plain, strict=True)]
    per_sequence = max(0.0, median(e / (count - 1) for e, count in zip(extra[1:], _SEQUENCES[1:], strict=True)))
    by_rows = [*rows, *(seconds - per_sequence * (_MANY - 1) for seconds in of_many)]
    per_token = max(0.0, (long - plain[_SEQUENCES.index(_LONG_SEQUENCES)]) / (_LONG_SEQUENCES * (_LONG - _SHORT)))
    per_slot = max(0.0, median(slots[1:] or slots))
    drafts = [max(0.0, d - per_slot * count * draft_len) for d, count in zip(drafts, _SEQUENCES, strict=False)]
    return Profile(
        name=f"{platform.node()}-{config.model.served_name}",
        model=config.model.path,
        device=f"{os.cpu_count()} cores" if config.target.device == "cpu" else config.target.device,
        date=datetime.date.today().isoformat(),
        source=f"measured by dflash-ray profile, medians of up to {_ROUNDS} steps of the engine alone",
        passes=Times(at=(*_ROWS, *_ROWS_OF_MANY), seconds=tuple(np.maximum.accumulate(by_rows).tolist())),
        per_sequence=per_sequence,
        per_context_token=per_token,
        prefill=Times(at=_PREFILLS, seconds=tuple(np.maximum.accumulate(prefills).tolist())),
        drafts=Times(at=_SEQUENCES, seconds=tuple(np.maximum.accumulate(drafts or [0.0] * len(_SEQUENCES)).tolist())),
        per_slot=per_slot,
        draft_len=draft_len,
        cores=float(os.cpu_count() or 1) if config.target.device == "cpu" else 0.0,
        pass_cores=pass_cores,
        draft_cores=draft_cores,
        max_batch_tokens=limits.max_batch_tokens,
        kv_cache_tokens=config.target.kv_cache_rows,
        max_model_len=min(config.model.max_model_len, 8192),
    )


def default_path(profile: Profile) -> Path:
    """Where a profile of this machine and model lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "dflash_ray" / "profiles" / f"{profile.name.replace('/', '_')}.json"
