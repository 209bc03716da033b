"""A running server on a file of prompts: policies of speculation in turns, by the number of clients.

    dflash-ray serve --config deployments/local_cpu.yaml
    python benchmarks/served.py --prompts benchmarks/drafter_prompts.jsonl --clients 1,2,4,8,16

Every load is a closed loop: so many clients send one request after the other. In each round the policies take turns at
the same requests, so that a slow minute is nobody's alone; ratios are those of a round, and the table has their median.
No turn finds another's prompts in the prefix cache (each has a `cache_salt` of its own). Answers are greedy and must be
equal, token for token. They are not all of one length (`--spread`): clients whose requests all end at once would send
their prompts at once too, and no client's decoding would ever wait for one. Prints figures; asserts nothing.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import typer

from dflash_ray.pb import generation_pb2, generation_pb2_grpc, router_pb2
from dflash_ray.rpc.channel import DIRECT
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import Prompt, read_prompts

_POLICIES = {
    "off": router_pb2.SPECULATION_POLICY_OFF,
    "adaptive": router_pb2.SPECULATION_POLICY_ADAPTIVE,
    "fixed": router_pb2.SPECULATION_POLICY_FIXED,
}


_GOLDEN = 0.618033988749895  # its multiples, less the whole numbers in them, are spread evenly however many there are


@dataclass
class Answer:
    """One streamed answer; seconds from the request to its first token, between chunks, and of the whole decode."""

    token_ids: list[int] = field(default_factory=list)
    first_token: float = 0.0
    seconds: float = 0.0
    gaps: list[tuple[float, int]] = field(default_factory=list)
    num_passes: int = 0
    num_prompt_tokens: int = 0
    passes_by_accepted: list[int] = field(default_factory=list)


@dataclass
class Turn:
    """One policy's turn at the requests of a round."""

    answers: list[Answer]
    seconds: float

    @property
    def token_rate(self) -> float:
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds

    @property
    def acceptance_length(self) -> float:
        return sum(len(a.token_ids) - 1 for a in self.answers) / max(1, sum(a.num_passes for a in self.answers))

    def gap_ms(self, percentile: float) -> float:
        gaps = [1000 * seconds / count for a in self.answers for seconds, count in a.gaps for _ in range(count)]
        return float(np.percentile(gaps, percentile)) if gaps else 0.0

    @property
    def first_token_ms(self) -> float:
        return 1000 * statistics.median(answer.first_token for answer in self.answers)


async def ask(stub, prompt: Prompt, policy: str, max_tokens: int, salt: str) -> Answer:
    """Streams one answer; `policy` is a name, or fixed:N."""
    name, _, count = policy.partition(":")
    request = generation_pb2.GenerateRequest(
        temperature=0.0,
        stopping=generation_pb2.StoppingCriteria(max_new_tokens=max_tokens),
        response=generation_pb2.ResponseOptions(output_token_ids=True),
        cache_salt=salt,
        speculation=router_pb2.Speculation(policy=_POLICIES[name], draft_tokens=int(count) if count else None),
    )
    for message in prompt.messages:
        request.chat.messages.add(role=message["role"], content=message["content"])
    answer = Answer()
    began = last = time.perf_counter()
    async for response in stub.GenerateStream(request):
        now = time.perf_counter()
        tokens = [token for output in response.outputs for token in output.token_ids]
        if tokens:
            if answer.token_ids:
                answer.gaps.append((now - last, len(tokens)))
            else:
                answer.first_token = now - began
            answer.token_ids += tokens
            last = now
        if response.HasField("speculative_decoding"):
            answer.num_passes = response.speculative_decoding.num_spec_steps
            answer.passes_by_accepted = list(response.speculative_decoding.acceptance_histogram)
        answer.num_prompt_tokens = response.num_prompt_tokens or answer.num_prompt_tokens
    answer.seconds = last - began - answer.first_token
    return answer


def length(number: int, max_tokens: int, spread: float) -> int:
    """Tokens of a request's answer: `max_tokens`, more or less that part of it."""
    return round(max_tokens * (1 + spread * (2 * (number * _GOLDEN % 1) - 1)))


async def take_turn(
    stub, prompts: Sequence[Prompt], policy: str, num_clients: int, max_tokens: int, salt: str, spread: float = 0.0
) -> Turn:
    """All prompts, so many at a time."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(prompts))

    async def client() -> None:
        for number, prompt in waiting:
            answers[number] = await ask(stub, prompt, policy, length(number, max_tokens, spread), salt)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return Turn([answers[number] for number in range(len(prompts))], time.perf_counter() - began)


def interleaved(path: Path) -> list[Prompt]:
    """One prompt of each category after the other."""
    left_out = LeftOut()
    by_source: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in read_prompts(path, left_out):
        by_source[prompt.source].append(prompt)
    typer.echo(left_out.text, err=True)
    longest = max(map(len, by_source.values()))
    return [members[i] for i in range(longest) for members in by_source.values() if i < len(members)]


async def measure(
    address: str,
    prompts: list[Prompt],
    policies: list[str],
    loads: list[int],
    rounds: int,
    turns: int,
    max_tokens: int,
    spread: float,
) -> None:
    typer.echo(
        "| clients | policy | tokens/s | ratio (rounds) | τ | TTFT ms | ITL ms p50 | p99 | answers that differ |"
    )
    typer.echo("|---|---|---|---|---|---|---|---|---|")
    async with grpc.aio.insecure_channel(address, options=DIRECT) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        chosen = iter(prompts * 1000)
        await take_turn(stub, list(islice(chosen, 2)), policies[0], 1, 8, "warm")
        for num_clients in loads:
            taken: dict[str, list[Turn]] = defaultdict(list)
            by_source: dict[tuple[str, str], list[Answer]] = defaultdict(list)
            for number in range(rounds):
                members = list(islice(chosen, turns * num_clients))
                order = policies[number % len(policies) :] + policies[: number % len(policies)]
                for policy in order:
                    salt = f"{num_clients} {number} {policy}"
                    turn = await take_turn(stub, members, policy, num_clients, max_tokens, salt, spread)
                    taken[policy].append(turn)
                    for prompt, answer in zip(members, turn.answers, strict=True):
                        by_source[prompt.source, policy].append(answer)
            for policy in policies:
                typer.echo(_row(num_clients, policy, taken[policy], taken[policies[0]]))
            if num_clients == 1:
                _print_sources(by_source, policies)


def _row(num_clients: int, policy: str, turns: list[Turn], base: list[Turn]) -> str:
    ratios = [turn.token_rate / other.token_rate for turn, other in zip(turns, base, strict=True)]
    different = sum(
        answer.token_ids != other.token_ids
        for turn, against in zip(turns, base, strict=True)
        for answer, other in zip(turn.answers, against.answers, strict=True)
    )

    def middle(values) -> float:
        return statistics.median(values)

    return (
        f"| {num_clients} | {policy} | {middle(turn.token_rate for turn in turns):.1f} | {middle(ratios):.2f} "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {middle(turn.acceptance_length for turn in turns):.2f} "
        f"| {middle(turn.first_token_ms for turn in turns):.0f} | {middle(turn.gap_ms(50) for turn in turns):.1f} "
        f"| {middle(turn.gap_ms(99) for turn in turns):.1f} | {different} |"
    )


def _print_sources(by_source: dict[tuple[str, str], list[Answer]], policies: list[str]) -> None:
    """Decoding alone, by category."""
    for source in sorted({source for source, _ in by_source}):
        rates = [
            sum(len(a.token_ids) - 1 for a in by_source[source, policy])
            / sum(a.seconds for a in by_source[source, policy])
            for policy in policies
        ]
        figures = ", ".join(f"{policy} {rate:.1f}" for policy, rate in zip(policies, rates, strict=True))
        typer.echo(f"  {source}: decoding, tokens/s: {figures}", err=True)


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL with prompt or messages, and source")],
    address: Annotated[str, typer.Option(help="gRPC address")] = "127.0.0.1:9000",
    policies: Annotated[str, typer.Option(help="of off, adaptive, fixed:N; the first is what others compare with")] = (
        "off,adaptive,fixed:5"
    ),
    clients: Annotated[str, typer.Option(help="closed loops of so many clients")] = "1,2,4,8,16",
    rounds: int = 3,
    turns: Annotated[int, typer.Option(help="requests of each client in a turn")] = 2,
    max_tokens: Annotated[int, typer.Option(help="of an answer, in the middle")] = 64,
    spread: Annotated[float, typer.Option(help="by which part of it answers are longer and shorter")] = 0.5,
) -> None:
    loads = [int(count) for count in clients.split(",")]
    asyncio.run(measure(address, interleaved(prompts), policies.split(","), loads, rounds, turns, max_tokens, spread))


if __name__ == "__main__":
    typer.run(main)
