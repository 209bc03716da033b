"""Verification of 32 sequences with 8 drafts each: the operators against plain torch, `transformers`, and an argmax.

`python benchmarks/verify.py`: all cores, float32 logits, interleaved rounds, medians. `target` logits are the embedded
model's over the prompts of `drafter_prompts.jsonl`; `peaked` ones are normals of which a few are likely, `flat` ones
unit normals, the worst case for pruning. Prints figures; asserts nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.generation.utils import _speculative_sampling

from dflash_ray.config import BUILTIN_MODEL
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.sampling.plan import COUPLED, REJECTION, SequencePlan
from dflash_ray.sampling.shards import SingleShard
from dflash_ray.sampling.verify import verify

SEQUENCES, ROWS, ROUNDS = 32, 9, 5
VOCABULARIES = (49_152, 151_936)
SHAPES = {"peaked": 8.0, "flat": 1.0}
CASES = {
    "greedy": {"temperature": 0.0},
    "coupled": {},
    "coupled, top-p 0.95": {"top_p": 0.95},
    "coupled, top-k 50": {"top_k": 50},
    "rejection": {"mode": REJECTION},
}


def plan(**values: object) -> list[SequencePlan]:
    defaults = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "mode": COUPLED, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "num_logprobs": -1, "position": 100,
    }  # fmt: skip
    tokens, parents = list(range(ROWS)), list(range(-1, ROWS - 1))
    return [SequencePlan(**(defaults | values), seed=s, tokens=tokens, parents=parents) for s in range(SEQUENCES)]


def plain_torch(logits: torch.Tensor) -> None:
    """Coupled verification written with torch's own operations: softmax, a sort for top-p, Gumbel noise, argmax."""
    probs = logits.softmax(-1)
    ordered, ids = probs.sort(dim=-1, descending=True)
    ordered[(ordered.cumsum(-1) - ordered) >= 0.95] = 0
    probs = torch.zeros_like(probs).scatter_(-1, ids, ordered)
    drawn = (probs.log() - torch.empty_like(probs).exponential_().log()).argmax(-1).view(SEQUENCES, ROWS)
    drafts = torch.arange(1, ROWS)
    (drawn[:, :-1] == drafts).long().cumprod(-1).sum(-1).tolist()


def transformers_sampling(logits: torch.Tensor) -> None:
    """The speculative sampling of `transformers` generate, one sequence at a time as it works."""
    ids = torch.arange(ROWS)[None]
    draft_logits = logits.view(SEQUENCES, ROWS, -1)[:, :-1]
    for i in range(SEQUENCES):
        _speculative_sampling(ids, draft_logits[i : i + 1], ROWS - 1, logits[i * ROWS : (i + 1) * ROWS][None])


def target_logits() -> torch.Tensor:
    """Float32 [SEQUENCES * ROWS, 49152]: what the embedded model says at consecutive tokens of one text."""
    lines = (Path(__file__).parent / "drafter_prompts.jsonl").read_text().splitlines()
    target = resolve_target(BUILTIN_MODEL)
    ids = target.load_tokenizer()("\n\n".join(json.loads(line)["prompt"] for line in lines))["input_ids"]
    with torch.inference_mode():
        return target.load_model()(torch.tensor([ids[: SEQUENCES * ROWS]])).logits[0].float().contiguous()


def random_logits(vocabulary: int, spread: float) -> torch.Tensor:
    return torch.randn(SEQUENCES * ROWS, vocabulary, generator=torch.Generator().manual_seed(0)) * spread


def measure(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each, in interleaved rounds after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def report(shape: str, logits: torch.Tensor) -> None:
    functions: dict[str, Callable[[], object]] = {
        "argmax": lambda: logits.argmax(-1),
        "plain torch, top-p 0.95": lambda: plain_torch(logits),
        "transformers, T=1": lambda: transformers_sampling(logits),
    }
    for name, values in CASES.items():
        functions[name] = lambda step=plan(**values): verify(logits, 0, step, SingleShard())
    figures = measure(functions)
    print(f"{SEQUENCES} x {ROWS} rows, vocabulary {logits.shape[1]}, {shape} logits")
    for name, value in figures.items():
        print(f"  {name:24}{value:9.1f} ms  {value / figures['argmax']:6.2f} x argmax")


def main() -> None:
    report("target", target_logits())
    for vocabulary in VOCABULARIES:
        for shape, spread in SHAPES.items():
            report(shape, random_logits(vocabulary, spread))


if __name__ == "__main__":
    main()
