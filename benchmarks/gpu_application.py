"""The whole application with SmolLM2 and a colocated drafter, speculation off and on, by the number of clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import served
from ports import free_port

from dflash_ray.app import running_app
from dflash_ray.config import load_config
from dflash_ray.pb import generation_pb2_grpc
from dflash_ray.rpc.channel import DIRECT

_PROMPTS = Path(__file__).with_name("drafter_prompts.jsonl")
_POLICIES = {"off": "off", "on": "fixed:5"}


def application(device: str, loads: tuple[int, ...], max_tokens: int) -> Iterator[tuple[str, float]]:
    """Figures by name: tokens/s, and answers that differ, of two requests of each client and 8 at least."""
    grpc_port = free_port()
    config = load_config(
        None,
        [
            f"target.device={device}",
            f"drafter.device={device}",
            "drafter.placement_mode=colocated",
            f"gateway.http_port={free_port()}",
            f"gateway.grpc_port={grpc_port}",
            "observability.log_level=WARNING",
        ],
    )
    with running_app(config):
        yield from asyncio.run(_measure(f"127.0.0.1:{grpc_port}", loads, max_tokens)).items()


async def _measure(address: str, loads: tuple[int, ...], max_tokens: int) -> dict[str, float]:
    prompts, figures = served.interleaved(_PROMPTS), {}
    async with grpc.aio.insecure_channel(address, options=DIRECT) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        await served.take_turn(stub, prompts[:2], "fixed:5", 1, 8, "warm")
        for clients in loads:
            members = (prompts * 2)[: max(8, 2 * clients)]
            turns = {}
            for name, policy in _POLICIES.items():
                turns[name] = await served.take_turn(stub, members, policy, clients, max_tokens, f"{clients} {name}")
                figures[f"application, {clients} clients, {name}, tokens/s"] = turns[name].token_rate
            pairs = zip(turns["off"].answers, turns["on"].answers, strict=True)
            figures[f"application, {clients} clients, answers that differ"] = sum(
                off.token_ids != on.token_ids for off, on in pairs
            )
    return figures
