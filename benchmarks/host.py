"""What everything around the model costs a step: CPU time of every part, bytes on every wire.

`python benchmarks/host.py [--quick] [--case 256x1k] [--json FILE]`: router, target, ranks, drafters and gateway over a
model that costs nothing (host_router.py, host_target.py, host_canned.py), in one process that hands the bytes of each
wire to the next part; the ranks of TP are processes of their own over gloo. CPU time of the thread that does the work,
median over steps; sockets and event loops are not in it. Each sequence has 7 drafts a step, of which two are kept, so
that a step gives it three tokens. Prints figures; asserts only that all tokens arrive.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from host_cases import Case, Clock, Texts
from host_router import Gateway, Router, indexed_at_once
from host_target import Drafter, Rank, Target, dismiss
from rich.console import Console
from rich.table import Table
from torch import distributed

from dflash_ray.config import ModelConfig
from dflash_ray.core.memory import keep_freed_memory
from dflash_ray.target_group.step_channel import StepChannel
from dflash_ray.target_group.tensor_parallel import create_store, join_store
from dflash_ray.text.tokenizer import ChatTokenizer

# What lies between a verdict and the next pass, in order; the others run beside it, features in part.
CRITICAL = (
    "target commit", "target codec", "router codec", "router scheduling", "drafter", "target batch", "target columns",
    "target to ranks", "rank",
)  # fmt: skip
ASIDE = (
    "target counts", "rank counts", "target features", "drafter features", "router chunks", "gateway",
)  # fmt: skip
OF_RANKS = ("rank", "rank counts")
WIRES = (
    "router to target", "target to router", "target to drafters", "router to drafters", "drafters to router",
    "router to gateway", "gateway to clients",
)  # fmt: skip
QUICK = Case(4, 64, width=64)
CASES = (
    *(Case(sequences, 1024) for sequences in (1, 32, 256, 1024)),
    Case(256, 1024, is_colocated=True),
    Case(256, 1024, penalties=True),
    Case(256, 16_384),
    Case(256, 16_384, penalties=True),
    Case(256, 1024, tp=4),
    Case(256, 1024, penalties=True, tp=4),
)


@dataclass
class Figures:
    """Of one case: milliseconds of CPU by part and bytes by wire, a step."""

    case: Case
    is_ahead: bool = False  # a step is sent before the result of the one before it
    ms: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def critical(self) -> float:
        """The other ranks do what rank 0 does, and at the same time.

        Features are on their way to the drafter while the result goes to the router and the request from there: half of
        what codecs and scheduling take, the other half is the step's way back. What features take longer counts.
        Drafters, too, are at work at the same time, each on its share of the sequences; a colocated one is the target.

        Where steps are ahead the router is at work while a pass runs. What the target does for the result, its counts
        of tokens too, is between passes: it waits for the same interpreter as what goes into the next one.
        """
        if self.is_ahead:
            return sum(self.ms.get(part, 0.0) for part in (*CRITICAL, "target counts") if "router" not in part)
        of_one = 1 / max(1, self.case.num_drafters)
        shared = sum(self.ms[part] for part in ("target batch", "target columns", "target commit"))
        hidden = min(self.ms.get("rank", 0.0), shared)
        request = sum(self.ms[part] for part in ("target codec", "router codec", "router scheduling")) / 2
        features = self.ms["target features"] + of_one * self.ms.get("drafter features", 0.0)
        drafters = (1 - of_one) * self.ms["drafter"]
        return sum(self.ms.get(part, 0.0) for part in CRITICAL) - hidden - drafters + max(0.0, features - request)

    @property
    def total(self) -> float:
        """Of all processes; what ranks do is that of the slowest one but the first."""
        others = sum(self.ms.get(part, 0.0) for part in OF_RANKS) * max(0, self.case.tp - 2)
        return sum(self.ms.values()) + others


class Loop:
    """All parts, and the wires between them."""

    def __init__(self, case: Case, channel: StepChannel | None) -> None:
        texts = Texts(case, tokenizer())
        self.clock = Clock()
        self.wires: Counter[str] = Counter()
        self._gateway = Gateway(case, self.clock, texts)
        self._router = Router(case, self.clock, texts.tokenizer.vocab_size)
        self._target = Target(case, self.clock, texts, channel)
        self._drafters = {name: Drafter(case, self.clock, texts, self._target) for name in self._router.drafter_names}
        self._steps: deque[bytes] = deque()  # at the target, or on their way there
        self._router.take_requests(self._gateway.requests)

    @property
    def is_ahead(self) -> bool:
        """Whether a step is at the target whose result is not waited for."""
        return len(self._steps) > 0

    async def start(self) -> None:
        """Prompts are over: what is under way arrives, then everything is as it is counted."""
        for _ in range(3):
            await self.step()
        self._target.start()
        for drafter in self._drafters.values():
            drafter.start()
        await self.step()

    async def close(self) -> None:
        for drafter in self._drafters.values():
            await drafter.close()

    async def step(self) -> int:
        """One pass and everything up to the next one; the requests that got tokens."""
        for message in self._router.to_target():
            self.wires["router to target"] += len(message)
            self._steps.append(message)
        if self._steps:
            message = self._steps.popleft()
            result = self._target.take(message)
            self.wires["target to router"] += len(result)
            self._router.take_from_target(result)
        for drafter in self._drafters.values():
            for part in drafter.features():
                self.wires["target to drafters"] += len(part)
                drafter.take_features(part)
        for name, message in self._router.to_drafters():
            self.wires["router to drafters"] += len(message)
            reply = await self._drafters[name].take(message)
            self.wires["drafters to router"] += len(reply)
            self._router.take_from_drafter(name, reply)
        messages = self._router.to_gateway()
        self.wires["router to gateway"] += sum(len(message) for message in messages)
        count, size = self._gateway.take(messages)
        self.wires["gateway to clients"] += size
        return count


@cache
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(ModelConfig())


async def measure(case: Case, steps: int, channel: StepChannel | None = None) -> Figures:
    """The case's figures; runs in an event loop because the pipeline sets timers."""
    with indexed_at_once():
        loop = Loop(case, channel)
        while await loop.step() < case.sequences:
            pass  # prompts are prefilled
        await loop.start()
    gc.collect()
    gc.freeze()  # what stands is not looked through again: each process would only have its own part
    num_ahead = 0
    parts: list[Counter[str]] = []
    wires: list[Counter[str]] = []
    for _ in range(steps):
        loop.clock.ns.clear()
        loop.wires.clear()
        if await loop.step() != case.sequences:
            raise RuntimeError(f"{case.name}: a step did not reach every request")
        num_ahead += loop.is_ahead
        parts.append(loop.clock.ns.copy())
        wires.append(loop.wires.copy())
    gc.unfreeze()
    await loop.close()
    return Figures(
        case,
        num_ahead == steps,
        {name: median(step[name] for step in parts) / 1e6 for name in parts[0]},
        {name: int(median(step[name] for step in wires)) for name in wires[0]},
    )


def _join(port: int, rank: int, tp: int, store: Any = None) -> StepChannel:
    torch.set_num_threads(1)
    store = store or join_store("127.0.0.1", port, tp, 60.0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=tp)
    return StepChannel()


def _run_rank(port: int, rank: int, case: Case, steps: int, report: Any) -> None:
    channel, clock = _join(port, rank, case.tp), Clock()
    other = Rank(case, clock, Texts(case, tokenizer()), channel)
    taken: list[Counter[str]] = []
    while other.follow():
        taken.append(clock.ns.copy())
        clock.ns.clear()
    report.put({part: median(step[part] for step in taken[-steps:]) / 1e6 for part in OF_RANKS})
    distributed.destroy_process_group()


@contextmanager
def ranks(case: Case, steps: int) -> Iterator[tuple[StepChannel | None, list[dict[str, float]]]]:
    """A channel to the other ranks; on leaving the list is filled with their milliseconds a step."""
    figures: list[dict[str, float]] = []
    tp = case.tp
    if tp == 1:
        yield None, figures
        return
    store = create_store("127.0.0.1", tp, 60.0)
    context = multiprocessing.get_context("spawn")
    report = context.Queue()
    processes = [context.Process(target=_run_rank, args=(store.port, at, case, steps, report)) for at in range(1, tp)]
    for process in processes:
        process.start()
    channel = _join(store.port, 0, tp, store)
    yield channel, figures
    dismiss(channel)
    figures += [report.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    distributed.destroy_process_group()


def run(case: Case, steps: int) -> Figures:
    with ranks(case, steps) as (channel, others):
        figures = asyncio.run(measure(case, steps, channel))
    if others:
        figures.ms |= {part: max(other[part] for other in others) for part in OF_RANKS}
    return figures


def show(results: list[Figures]) -> None:
    table = Table("ms of CPU a step", *(figures.case.name for figures in results))
    for part in (*CRITICAL, *ASIDE):
        table.add_row(part, *(f"{figures.ms.get(part, 0.0):.2f}" for figures in results))
    table.add_section()
    table.add_row("critical path", *(f"{figures.critical:.2f}" for figures in results))
    table.add_row("all processes", *(f"{figures.total:.2f}" for figures in results))
    table.add_section()
    table.add_row("bytes a step")
    for wire in WIRES:
        table.add_row(wire, *(f"{figures.bytes.get(wire, 0):,}" for figures in results))
    Console(width=max(100, 40 + 16 * len(results))).print(table)


def selected(names: list[str]) -> list[Case]:
    """Cases by names such as 256x1k, 256x16k-penalties, 256x1k-tp4 or 1x1k-colocated-adaptive-cold; all without names.

    `off` and `adaptive` are policies, `fixed3` one with so many drafts.
    """
    cases = []
    for name in names:
        size, *options = name.split("-")
        sequences, context = size.split("x")
        case = Case(int(sequences), int(context.removesuffix("k")) * 1024)
        tp = next((int(option.removeprefix("tp")) for option in options if option.startswith("tp")), 1)
        chosen = {"penalties": "penalties", "is_colocated": "colocated", "sends_rows": "messages", "is_cold": "cold"}
        case = replace(case, tp=tp, **{name: option in options for name, option in chosen.items()})
        for option in options:
            if option in ("off", "adaptive"):
                case = replace(case, policy=option)
            elif option.startswith("fixed"):
                case = replace(case, drafts=int(option.removeprefix("fixed")))
        cases.append(case)
    return cases or list(CASES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="e.g. 256x1k, 256x16k-penalties, 256x1k-tp4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    parser.add_argument("--quick", action="store_true", help="one small case, to see that every part runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    cases = [QUICK, replace(QUICK, penalties=True, tp=2)] if options.quick else selected(options.case)
    results = [run(case, 3 if options.quick else options.steps) for case in cases]
    show(results)
    if options.json is not None:
        figures = [asdict(f) | {"critical": f.critical, "total": f.total} for f in results]
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
