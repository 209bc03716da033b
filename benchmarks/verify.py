"""Verification of 32 sequences with 8 drafts each: the operators against plain torch, `transformers`, and an argmax.

`python benchmarks/verify.py`: all cores, float32 logits, interleaved rounds, medians. `target` logits are the embedded
model's over the prompts of `drafter_prompts.jsonl`; `peaked` ones are normals of which a few are likely, `flat` ones
unit normals, the worst case for pruning. Prints figures; asserts nothing.

`--device cuda`: float32 and bfloat16 logits on a GPU; calls take turns over clones, so that its cache holds none. A
step is measured as the whole call of `verify`, the host's work and wait included, and as its kernels alone, queued
behind a pause so that the GPU never waits for the host. Bytes per second are those of one read of the logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from transformers.generation.utils import _speculative_sampling

from dflash_ray.config import BUILTIN_MODEL
from dflash_ray.kernels import build
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.sampling.columns import DrawRows, PlanColumns, columns_of
from dflash_ray.sampling.parameters import NO_LIMIT, REJECTION, SamplingParams
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.sampling.table import SamplingTable
from dflash_ray.sampling.verify import launch, verify

SEQUENCES, ROWS, ROUNDS = 32, 9, 5
GPU_ROUNDS, GPU_WARM_UPS, GPU_CLONES = 24, 4, 4
PAUSE = 5_000_000  # cycles of the GPU, about 3 ms: the host launches a batch of kernels meanwhile
VOCABULARIES = (49_152, 151_936)
SHAPES = {"peaked": 8.0, "flat": 1.0}
CASES = {
    "greedy": {"temperature": 0.0},
    "coupled": {},
    "coupled, top-p 0.95": {"top_p": 0.95},
    "coupled, top-k 50": {"top_k": 50},
    "rejection": {"mode": REJECTION},
}
Step = Callable[[torch.Tensor], object]
Clock = Callable[[Step, list[torch.Tensor]], float]


def step_columns(device: torch.device, **values: object) -> PlanColumns:
    """Of SEQUENCES chains, each with a seed of its own."""
    table, no_tokens = SamplingTable(SEQUENCES), np.zeros(0, dtype=np.int64)
    for slot in range(SEQUENCES):
        params = SamplingParams(**({"temperature": 1.0, "seed": slot} | values))
        table.open(slot, params, no_tokens, 0, 0, NO_LIMIT, no_tokens)
    rows = DrawRows(
        slots=np.arange(SEQUENCES),
        num_rows=np.full(SEQUENCES, ROWS),
        positions=np.full(SEQUENCES, 100),
        token_ids=np.tile(np.arange(ROWS), SEQUENCES),
        feature_rows=np.full(SEQUENCES, -1),
    )
    return columns_of(rows, table, device)


def plain_torch(logits: torch.Tensor) -> None:
    """Coupled verification written with torch's own operations: softmax, a sort for top-p, Gumbel noise, argmax."""
    probs = logits.softmax(-1, dtype=torch.float32)
    ordered, ids = probs.sort(dim=-1, descending=True)
    ordered[(ordered.cumsum(-1) - ordered) >= 0.95] = 0
    probs = torch.zeros_like(probs).scatter_(-1, ids, ordered)
    drawn = (probs.log() - torch.empty_like(probs).exponential_().log()).argmax(-1).view(SEQUENCES, ROWS)
    drafts = torch.arange(1, ROWS, device=logits.device)
    (drawn[:, :-1] == drafts).long().cumprod(-1).sum(-1).tolist()


def transformers_sampling(logits: torch.Tensor) -> None:
    """The speculative sampling of `transformers` generate, one sequence at a time as it works."""
    ids = torch.arange(ROWS, device=logits.device)[None]
    rows = logits.float().view(SEQUENCES, ROWS, -1)
    draft_logits = rows[:, :-1]
    # Releases before the one that we require ask for one argument more.
    older = {"is_done_candidate": False} if "is_done_candidate" in signature(_speculative_sampling).parameters else {}
    for i in range(SEQUENCES):
        _speculative_sampling(ids, draft_logits[i : i + 1], ROWS - 1, rows[i : i + 1], **older)


def kernels(columns: PlanColumns, logits: torch.Tensor) -> None:
    """What `verify` launches for a plan whose columns are on the device."""
    launch(logits, 0, columns, SingleRank())


def target_logits() -> torch.Tensor:
    """Float32 [SEQUENCES * ROWS, 49152]: what the embedded model says at consecutive tokens of one text."""
    lines = (Path(__file__).parent / "drafter_prompts.jsonl").read_text().splitlines()
    target = resolve_target(BUILTIN_MODEL)
    ids = target.load_tokenizer()("\n\n".join(json.loads(line)["prompt"] for line in lines))["input_ids"]
    with torch.inference_mode():
        return target.load_model()(torch.tensor([ids[: SEQUENCES * ROWS]])).logits[0].float().contiguous()


def random_logits(vocabulary: int, spread: float) -> torch.Tensor:
    return torch.randn(SEQUENCES * ROWS, vocabulary, generator=torch.Generator().manual_seed(0)) * spread


def all_steps(device: torch.device) -> dict[str, Step]:
    steps: dict[str, Step] = {
        "argmax": lambda logits: logits.argmax(-1),
        "plain torch, top-p 0.95": plain_torch,
        "transformers, T=1": transformers_sampling,
    }
    for name, values in CASES.items():
        columns = step_columns(device, **values)
        steps[name] = lambda logits, columns=columns: verify(logits, 0, columns, SingleRank())
    return steps


def host_clock(step: Step, inputs: list[torch.Tensor]) -> float:
    """Milliseconds until a step over the first input is done."""
    started = time.perf_counter()
    step(inputs[0])
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def gpu_clock(step: Step, inputs: list[torch.Tensor]) -> float:
    """Milliseconds of the GPU that a step takes, from two over each input."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(PAUSE)
    start.record()
    for logits in inputs * 2:
        step(logits)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (2 * len(inputs))


def measure(
    steps: dict[str, Step],
    inputs: list[torch.Tensor],
    clock: Clock = host_clock,
    rounds: int = ROUNDS,
    warm_ups: int = 1,
) -> dict[str, float]:
    """Median milliseconds of each, in interleaved rounds after some that are not counted; inputs take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warm_ups + rounds):
        for name, step in steps.items():
            times[name].append(clock(step, inputs))
            inputs = [*inputs[1:], inputs[0]]
    return {name: statistics.median(values[warm_ups:]) for name, values in times.items()}


def report(shape: str, logits: torch.Tensor) -> None:
    figures = measure(all_steps(logits.device), [logits])
    print(f"{SEQUENCES} x {ROWS} rows, vocabulary {logits.shape[1]}, {shape} logits")
    for name, value in figures.items():
        print(f"  {name:24}{value:9.1f} ms  {value / figures['argmax']:6.2f} x argmax")


@torch.inference_mode()
def report_gpu(shape: str, logits: torch.Tensor) -> None:
    inputs = [logits.clone() for _ in range(GPU_CLONES)]
    columns = {name: step_columns(logits.device, **values) for name, values in CASES.items()}
    launches: dict[str, Step] = {name: partial(kernels, columns[name]) for name in CASES}
    whole = measure(all_steps(logits.device), inputs, host_clock, GPU_ROUNDS, GPU_WARM_UPS)
    alone = measure({"argmax": lambda x: x.argmax(-1)} | launches, inputs, gpu_clock, GPU_ROUNDS, GPU_WARM_UPS)
    size = f"{logits.nbytes / 1e6:.0f} MB"
    print(f"{SEQUENCES} x {ROWS} rows, vocabulary {logits.shape[1]}, {shape} logits, {logits.dtype}, {size}")
    for name, value in whole.items():
        line = f"  {name:24}{value * 1e3:10.1f} us the call"
        if name in alone:
            multiple, rate = alone[name] / alone["argmax"], logits.nbytes / alone[name] / 1e9
            line += f"{alone[name] * 1e3:10.1f} us its kernels  {multiple:6.2f} x argmax  {rate:6.3f} TB/s of one read"
        print(line, flush=True)


@torch.inference_mode()
def report_graphs(logits: torch.Tensor) -> None:
    """Kernels of a step over each clone as one CUDA graph."""
    inputs = [logits.clone() for _ in range(GPU_CLONES)]
    for name in ("greedy", "coupled"):
        step = partial(kernels, step_columns(logits.device, **CASES[name]))
        step(logits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for clone in inputs:
                step(clone)
        replay: dict[str, Step] = {name: lambda _, graph=graph: graph.replay()}
        value = measure(replay, [logits], gpu_clock, GPU_ROUNDS, GPU_WARM_UPS)[name] / GPU_CLONES
        rate = logits.nbytes / value / 1e9
        print(f"  {name + ' in a CUDA graph':24}{value * 1e3:10.1f} us  {rate:6.3f} TB/s of one read", flush=True)


def on_gpu(device: torch.device) -> None:
    operators = "compiled operators" if build.is_loaded_for(device.type) else "operators in plain torch"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {operators}")
    for dtype in (torch.float32, torch.bfloat16):
        report_gpu("target", target_logits().to(device, dtype))
        for vocabulary in VOCABULARIES:
            for shape, spread in SHAPES.items():
                logits = random_logits(vocabulary, spread).to(device, dtype)
                report_gpu(shape, logits)
    report_graphs(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.device == "cuda":
        on_gpu(torch.device("cuda"))
        return
    report("target", target_logits())
    for vocabulary in VOCABULARIES:
        for shape, spread in SHAPES.items():
            report(shape, random_logits(vocabulary, spread))


if __name__ == "__main__":
    main()
