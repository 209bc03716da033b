"""What of the GPU benchmark runs in one process: the floor, steps, prefill, the drafter, verification, on = off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import gpu_models
import numpy as np
import torch
import verify
from gpu_sequences import Sequences, differing

from dflash_ray.config import parse_config
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.draft_contexts import ContextRows
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.fixed_passes import new_runner
from dflash_ray.target_group.model import RankModel


@dataclass(frozen=True)
class Scale:
    """How much is measured: on a GPU, or so little that a CPU is done in a minute.

    Attributes:
        equality: prompts and tokens of each.
    """

    shape: str
    device: str
    dtype: str
    context: int
    cache_tokens: int
    rounds: int
    prefill: int
    copy_bytes: int
    equality: tuple[int, int]


GPU = Scale("8b", "cuda", "bfloat16", 512, 65536, 12, 2048, 1 << 31, (64, 256))
TINY = Scale("tiny", "cpu", "float32", 32, 8192, 2, 256, 1 << 24, (6, 24))
GRID = [(sequences, rows) for sequences in (1, 32) for rows in (1, 8, 16)]
DRAFTED = (1, 8, 32)  # sequences
_BATCHES = (1, 8, 32, 3, 20)


class EngineBench:
    """A random target and drafter of one scale. Every method yields figures: name and value."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._random = np.random.default_rng(0)
        self._dtype = getattr(torch, scale.dtype)
        self._target = gpu_models.RandomTarget(Path(), shape=scale.shape)
        self._drafter = gpu_models.random_drafter(scale.shape)
        config = parse_config(
            {
                "model": {"dtype": scale.dtype},
                "target": {"device": scale.device, "kv_cache_tokens": scale.cache_tokens, "max_batch_tokens": 2048},
            }
        )
        projector = self._drafter.build_projector(self._dtype).to(scale.device)
        taps = self._drafter.config.target_layer_ids
        model = RankModel(self._target, config, 0, 1, projector, taps, runs_as_device=True)
        self._vocab_size = model.vocab_size

        def sequences(is_exact: bool) -> Sequences:
            own = config.model_copy(update={"target": config.target.model_copy(update={"exact": is_exact})})
            runner = new_runner(model, SingleRank(), own)
            return Sequences(Engine(runner, own.target.num_pages, own.target.page_size, model.max_model_len), vocab)

        vocab = model.vocab_size
        # Over one cache, which is empty from part to part.
        self._sequences = {"": sequences(True), ", not exact": sequences(False)}

    def floor(self) -> Iterator[tuple[str, float]]:
        source = torch.empty(self._scale.copy_bytes, dtype=torch.uint8, device=self._scale.device)
        target = torch.empty_like(source)
        ms = self._median_ms(lambda: target.copy_(source))
        bandwidth = 2 * len(source) / ms / 1e9  # TB/s
        weights = self._target.bytes_a_step
        yield "copy, TB/s", bandwidth
        yield "weights read a step, GB", weights / 1e9
        yield "floor of a step, ms", weights / bandwidth / 1e9

    def steps(self) -> Iterator[tuple[str, float]]:
        for (count, rows), (kind, sequences) in product(GRID, self._sequences.items()):
            ids = [sequences.open(self._scale.context, seed) for seed in range(count)]
            yield f"step, {count} x {rows} rows{kind}, ms", self._median_ms(partial(self._step, sequences, ids, rows))
            sequences.close(ids)

    def _step(self, sequences: Sequences, ids: list[int], rows: int) -> None:
        drafts = self._random.integers(0, self._vocab_size, (len(ids), rows - 1)).tolist()
        sequences.step(ids, drafts)

    def prefill(self) -> Iterator[tuple[str, float]]:
        def prompt(sequences: Sequences) -> None:
            sequences.close([sequences.open(self._scale.prefill)])

        for kind, sequences in self._sequences.items():
            yield f"prefill of {self._scale.prefill} tokens{kind}, ms", self._median_ms(partial(prompt, sequences), 5)

    @torch.inference_mode()
    def drafts(self) -> Iterator[tuple[str, float]]:
        drafter = BlockDrafter(self._drafter, self._target, self._scale.device, self._dtype)
        width = self._drafter.config.hidden_size
        for count in DRAFTED:
            sessions = list(range(count))
            for session in sessions:
                drafter.open(session)
            held = 0

            def extend(rows: int, sessions: list[int] = sessions) -> None:
                nonlocal held
                counts = np.full(len(sessions), rows)
                features = torch.randn(len(sessions) * rows, width, dtype=self._dtype).to(self._scale.device)
                drafter.extend(ContextRows(np.array(sessions), np.full(len(sessions), held), counts, features))
                held += rows

            def propose(sessions: list[int] = sessions) -> None:
                size = len(sessions)
                drafter.propose(sessions, [7] * size, [15] * size, 1, [None] * size)

            extend(self._scale.context)
            propose_ms, extend_ms = self._median_ms(propose), self._median_ms(partial(extend, 4))
            yield f"propose, {count} sequences, ms", propose_ms
            yield f"extend by 4 rows, {count} sequences, ms", extend_ms
            yield f"propose + extend, {count} sequences, ms", propose_ms + extend_ms
            for session in sessions:
                drafter.close(session)

    @torch.inference_mode()
    def verification(self) -> Iterator[tuple[str, float]]:
        device = torch.device(self._scale.device)
        logits = verify.random_logits(self._vocab_size, verify.SHAPES["peaked"]).to(device, self._dtype)
        steps: dict[str, verify.Step] = {"argmax": lambda rows: rows.argmax(-1)}
        for name, values in verify.CASES.items():
            steps[name] = partial(verify.kernels, verify.step_columns(device, **values))
        clock = verify.gpu_clock if device.type == "cuda" else verify.host_clock
        clones = [logits.clone() for _ in range(verify.GPU_CLONES)]
        figures = verify.measure(steps, clones, clock, self._scale.rounds, 2)
        yield "argmax of 32 x 9 rows, ms", figures["argmax"]
        for name in verify.CASES:
            yield f"verification against argmax, {name}", figures[name] / figures["argmax"]

    def equality(self) -> Iterator[tuple[str, float]]:
        prompts, tokens = self._scale.equality
        for kind, sequences in self._sequences.items():
            different = differing(sequences, prompts, tokens, 24, _BATCHES)
            yield f"texts with drafts that differ, of {prompts} of {tokens} tokens{kind}", different

    def _median_ms(self, call: Callable[[], object], most: int | None = None) -> float:
        rounds = self._scale.rounds if most is None else min(most, self._scale.rounds)
        times = []
        for _ in range(2 + rounds):
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            times.append((time.perf_counter() - began) * 1e3)
        return median(times[2:])

    def _wait(self) -> None:
        if self._scale.device == "cuda":
            torch.cuda.synchronize()
