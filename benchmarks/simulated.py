"""A running server against the simulator over this machine's profile: the same requests, measured and simulated.

    dflash-ray serve --config deployments/local_cpu.yaml
    dflash-ray profile --config deployments/local_cpu.yaml --server 127.0.0.1:9000 --out profile.json
    python benchmarks/simulated.py --profile profile.json --prompts benchmarks/drafter_prompts.jsonl

Every setting is a closed loop of so many clients with one policy; all take turns, as in served.py. The simulator gets
what it cannot know: how long prompts and answers are, and how often drafts were accepted, slot by slot (for `adaptive`
as with a fixed number at the same load). Of times it gets the profile alone. Prints figures; asserts nothing.
"""

from __future__ import annotations

import asyncio
import statistics
from itertools import islice
from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import typer
from served import Turn, interleaved, take_turn

from dflash_ray.pb import generation_pb2_grpc
from dflash_ray.rpc.channel import DIRECT
from dflash_ray.simulator.deployment import Deployment
from dflash_ray.simulator.profile import Profile, load_profile
from dflash_ray.simulator.simulation import Outcome, simulate
from dflash_ray.simulator.workload import Category, Request, Workload
from dflash_ray.training.prompt_files import Prompt


def acceptance(turns: list[Turn]) -> tuple[float, ...]:
    """The chance of each slot's draft once those before it were accepted."""
    width = max(len(answer.passes_by_accepted) for turn in turns for answer in turn.answers)
    passes = np.zeros(max(2, width))
    for turn in turns:
        for answer in turn.answers:
            passes[: len(answer.passes_by_accepted)] += answer.passes_by_accepted
    reached = passes[::-1].cumsum()[::-1]
    return tuple((reached[1:] / np.maximum(1, reached[:-1])).tolist())


def simulated(
    profile: Profile, turns: list[Turn], chances: tuple[float, ...], policy: str, clients: int, num_drafters: int
) -> Outcome:
    """The requests of all turns, one after the other, as the simulator runs them."""
    name, _, count = policy.partition(":")
    category = Category(acceptance=chances)
    answers = [answer for turn in turns for answer in turn.answers]
    requests = [
        Request(number, category, answer.num_prompt_tokens, len(answer.token_ids), None, number)
        for number, answer in enumerate(answers)
    ]
    deployment = Deployment(profile, name, num_drafters, draft_tokens=int(count or 4))
    return simulate(deployment, Workload(clients=clients, requests=len(requests)), requests)


async def measure(
    address: str, prompts: list[Prompt], settings: list[tuple[int, str]], rounds: int, turns: int, max_tokens: int
) -> dict[tuple[int, str], list[Turn]]:
    """Every setting once in each round, at prompts of its number of clients."""
    taken: dict[tuple[int, str], list[Turn]] = {setting: [] for setting in settings}
    async with grpc.aio.insecure_channel(address, options=DIRECT) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        await take_turn(stub, prompts[:2], settings[0][1], 2, 8, "warm")
        for number in range(rounds):
            for clients, policy in settings:
                first = number * turns * clients
                members = list(islice(iter(prompts * 1000), first, first + turns * clients))
                salt = f"{clients} {number} {policy}"
                taken[clients, policy].append(await take_turn(stub, members, policy, clients, max_tokens, salt))
    return taken


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL with prompt or messages, and source")],
    profile: Annotated[str, typer.Option(help="of this machine, made by dflash-ray profile with --server")],
    address: Annotated[str, typer.Option(help="gRPC address")] = "127.0.0.1:9000",
    policies: Annotated[str, typer.Option(help="of off, adaptive, fixed:N")] = "off,fixed:3",
    clients: Annotated[str, typer.Option(help="closed loops of so many clients")] = "1,4,16",
    drafters: Annotated[int, typer.Option(help="remote drafters of the server; 0: its drafter is colocated")] = 0,
    rounds: int = 3,
    turns: Annotated[int, typer.Option(help="requests of each client in a turn")] = 2,
    max_tokens: int = 64,
) -> None:
    times = load_profile(profile)
    settings = [(int(count), policy) for count in clients.split(",") for policy in policies.split(",")]
    taken = asyncio.run(measure(address, interleaved(prompts), settings, rounds, turns, max_tokens))
    typer.echo(
        "| clients | policy | τ (simulated) | measured tokens/s (rounds) | simulated | error | TTFT ms | simulated |"
    )
    typer.echo("|---|---|---|---|---|---|---|---|")
    for (count, policy), seen in taken.items():
        drafted = next((t for (c, p), t in taken.items() if c == count and p.startswith("fixed")), seen)
        chances = acceptance(drafted if policy == "adaptive" else seen)
        typer.echo(_row(count, policy, seen, simulated(times, seen, chances, policy, count, drafters)))


def _row(count: int, policy: str, seen: list[Turn], outcome: Outcome) -> str:
    rates = [turn.token_rate for turn in seen]
    measured = statistics.median(rates)
    first_token = statistics.median(turn.first_token_ms for turn in seen)
    return (
        f"| {count} | {policy} | {statistics.median(turn.acceptance_length for turn in seen):.2f} "
        f"({outcome.acceptance_length:.2f}) | {measured:.1f} ({', '.join(f'{rate:.1f}' for rate in rates)}) "
        f"| {outcome.token_rate:.1f} | {outcome.token_rate / measured - 1:+.0%} "
        f"| {first_token:.0f} | {1000 * np.median(outcome.first_token):.0f} |"
    )


if __name__ == "__main__":
    typer.run(main)
