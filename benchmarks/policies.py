"""Policies of speculation over the real target and drafter, in one process: scheduler and engine, a clock of CPU time.

    OMP_NUM_THREADS=1 python benchmarks/policies.py --prompts benchmarks/drafter_prompts.jsonl --clients 1,4,16

The drafter is colocated. Time is that of the process on its core, so that other work on the machine changes little.
Each load is a closed loop; the policies take turns at the same prompts. Answers are greedy and must be equal, token for
token. `--random` gives the drafter random weights. Prints figures; asserts nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer

from dflash_ray.config import load_config
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint, resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.pb import common_pb2, router_pb2
from dflash_ray.router.actions import CloseSequences, Emit, RunStep
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.scheduler import Scheduler
from dflash_ray.target_group.codec import decode_step, encode_result
from dflash_ray.target_group.engine import Engine
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.config import EngineSection
from dflash_ray.training.decoding import local_engine
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import read_prompts

_POLICIES = {
    "off": router_pb2.SPECULATION_POLICY_OFF,
    "adaptive": router_pb2.SPECULATION_POLICY_ADAPTIVE,
    "fixed": router_pb2.SPECULATION_POLICY_FIXED,
}


@dataclass
class Turn:
    """What one policy made of the prompts of a round."""

    seconds: float = 0.0
    answers: dict[int, list[int]] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)  # seconds a token, of every token after a sequence's first
    num_passes: int = 0

    @property
    def token_rate(self) -> float:
        return sum(map(len, self.answers.values())) / self.seconds


class Server:
    """One scheduler over one engine; what the controller learns in a turn it keeps for the next."""

    def __init__(self, engine: Engine, limits: TargetLimits, overrides: Sequence[str]) -> None:
        self._engine = engine
        self._limits = limits
        self.scheduler = Scheduler(load_config(None, ["drafter.placement_mode=colocated", *overrides]))
        self.scheduler.target_ready(limits, time.process_time())

    def run(self, prompts: list[list[int]], policy: str, clients: int, max_tokens: int) -> Turn:
        """All prompts, so many at a time."""
        name, _, count = policy.partition(":")
        speculation = router_pb2.Speculation(policy=_POLICIES[name], draft_tokens=int(count) if count else None)
        turn, waiting = Turn(), iter(enumerate(prompts))
        numbers: dict[int, int] = {}
        last: dict[int, float] = {}

        def arrive() -> None:
            for number, token_ids in islice(waiting, 1):
                request = router_pb2.GenerateTokensRequest(
                    token_ids=token_ids,
                    prompt_len=len(token_ids),
                    sampling=common_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0),
                    stopping=common_pb2.StoppingParams(max_new_tokens=max_tokens),
                    speculation=speculation,
                )
                sequence = self.scheduler.arrive(request, time.process_time())
                numbers[sequence.sequence_id] = number
                turn.answers[number] = []

        began = time.process_time()
        for _ in range(clients):
            arrive()
        while numbers:
            for action in self.scheduler.poll(time.process_time()):
                match action:
                    case RunStep(step):
                        output = self._engine.step(decode_step(step))
                        result = encode_result(output)
                        result.timings.draft_ns = output.draft_ns
                        turn.num_passes += len(step.verify_ids)
                        self.scheduler.step_done(result, time.process_time())
                    case CloseSequences(ids):
                        self._engine.close(ids)
                    case Emit():
                        now = time.process_time()
                        for sequence_id, tokens, reason in action.entries():
                            turn.answers[numbers[sequence_id]] += tokens
                            if sequence_id in last and tokens:
                                turn.gaps += [(now - last[sequence_id]) / len(tokens)] * len(tokens)
                            last[sequence_id] = now
                            if reason:
                                del numbers[sequence_id]
                                arrive()
        turn.seconds = time.process_time() - began
        return turn


def with_random_weights(drafter: DrafterCheckpoint) -> DrafterCheckpoint:
    """The same drafter, that knows nothing."""
    torch.manual_seed(0)
    weights = {name: torch.randn_like(values) * values.std() for name, values in drafter.weights.items()}
    return replace(drafter, weights=weights)


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL with prompt or messages, and source")],
    clients: str = "1,2,4,8,16",
    policies: str = "off,adaptive,fixed:5",
    rounds: int = 3,
    turns: Annotated[int, typer.Option(help="prompts of each client in a turn")] = 2,
    max_tokens: int = 64,
    random: Annotated[bool, typer.Option(help="a drafter of random weights")] = False,
) -> None:
    config = load_config(None)
    target = resolve_target(config.model.path)
    drafter = resolve_drafter(config.drafter.path, target)
    drafter = with_random_weights(drafter) if random else drafter
    tokenizer = ChatTokenizer(config.model)
    by_source: dict[str, list[list[int]]] = defaultdict(list)
    for prompt in read_prompts(prompts, LeftOut()):
        by_source[prompt.source].append(tokenizer.encode_chat(prompt.messages))
    longest = max(map(len, by_source.values()))
    texts = [members[i] for i in range(longest) for members in by_source.values() if i < len(members)] * 100
    settings = EngineSection(max_model_len=2048, kv_cache_tokens=config.target.kv_cache_rows)
    names = policies.split(",")
    typer.echo(
        "| clients | policy | tokens/s | ratio (rounds) | τ | ITL ms p50 | p99 | answers that differ | reasons |"
    )
    typer.echo("|---|---|---|---|---|---|---|---|---|")
    with local_engine(config.model.path, settings, drafter=drafter) as (engine, checked):
        limits = TargetLimits(
            1, checked.max_model_len, checked.vocab_size, settings.page_size, config.target.num_pages,
            checked.max_batch_tokens, colocated_draft_tokens=drafter.config.block_size - 1, feature_fingerprint="x",
        )  # fmt: skip
        chosen = iter(texts)
        server = Server(engine, limits, [])
        for count in map(int, clients.split(",")):
            taken: dict[str, list[Turn]] = defaultdict(list)
            before = server.scheduler.speculating.controller.counts.steps.copy()
            for number in range(rounds):
                members = list(islice(chosen, count * turns))
                for policy in names[number % len(names) :] + names[: number % len(names)]:
                    taken[policy].append(server.run(members, policy, count, max_tokens))
            steps = server.scheduler.speculating.controller.counts.steps - before
            for policy in names:
                typer.echo(_row(count, policy, taken[policy], taken[names[0]], dict(steps)))


def _row(count: int, policy: str, turns: list[Turn], base: list[Turn], reasons: dict[str, int]) -> str:
    ratios = [turn.token_rate / other.token_rate for turn, other in zip(turns, base, strict=True)]
    rate = statistics.median(turn.token_rate for turn in turns)
    gaps = sorted(1000 * gap for turn in turns for gap in turn.gaps)
    tokens = sum(len(answer) - 1 for turn in turns for answer in turn.answers.values())
    different = sum(turn.answers != other.answers for turn, other in zip(turns, base, strict=True))
    shown = (
        ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items())) if policy == "adaptive" else ""
    )
    return (
        f"| {count} | {policy} | {rate:.1f} | {statistics.median(ratios):.2f} "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {tokens / sum(turn.num_passes for turn in turns):.2f} "
        f"| {gaps[len(gaps) // 2]:.1f} | {gaps[int(0.99 * len(gaps))]:.1f} | {different} | {shown} |"
    )


if __name__ == "__main__":
    typer.run(main)
