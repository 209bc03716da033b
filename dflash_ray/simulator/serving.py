"""What serving adds to the passes: router, gateway, wires and clients, from a running server's metrics.

The server answers two loads, plainly and with a fixed number of drafts. How long lies between two passes, and what each
process computes beside them, comes from the server's own metrics and from this process, which is the clients'.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import grpc
import httpx

from dflash_ray.pb import generation_pb2, generation_pb2_grpc, router_pb2
from dflash_ray.rpc.channel import DIRECT
from dflash_ray.simulator.profile import Profile, Times

_LOADS = (2, 8)  # clients
_TURNS = 2  # requests of each
_ROUNDS = 3
_TOKENS = 48
_DRAFTS = 3
_Samples = tuple[tuple[str, str, float], ...]  # name, labels, value
_SAMPLE = re.compile(r"^(?P<name>[^\s{]+)\{(?P<labels>.*)\} (?P<value>\S+)$")
_PROMPT = "Tell the story of number {number}: who counted it first, what for, and what became of it."


@dataclass(frozen=True, slots=True)
class _Reading:
    """What the counters of a server, and of the clients, show."""

    samples: _Samples
    client_cpu: float

    def total(self, name: str, label: str = "") -> float:
        """Over all processes whose labels contain that text."""
        return sum(value for own, labels, value in self.samples if own == name and label in labels)


@dataclass(frozen=True, slots=True)
class _Load:
    """Seconds a step, under so many sequences."""

    sequences: float
    host: float
    ask: float
    beside: float


def with_serving(profile: Profile, grpc_address: str, http_url: str, on_step: Callable[[str], None]) -> Profile:
    """A machine's profile with what a server on it adds. Raises ConnectionError where the server does not answer.

    Args:
        on_step: told what is measured now.
    """
    try:
        loads = asyncio.run(_measure(grpc_address, http_url, on_step))
    except (grpc.RpcError, httpx.HTTPError) as error:
        raise ConnectionError(f"{grpc_address}, {http_url}: {error}") from None
    times = {name: _by_sequences(loads, name) for name in ("host", "ask", "beside")}
    source = f"{profile.source}; and a running server with {' and '.join(map(str, _LOADS))} clients"
    return profile.model_copy(update={**times, "source": source})


async def _measure(grpc_address: str, http_url: str, on_step: Callable[[str], None]) -> list[_Load]:
    async with (
        grpc.aio.insecure_channel(grpc_address, options=DIRECT) as channel,
        httpx.AsyncClient(base_url=http_url, timeout=30, trust_env=False) as http,
    ):
        stub = generation_pb2_grpc.GenerationStub(channel)
        await _take_turn(stub, max(_LOADS), router_pb2.SPECULATION_POLICY_FIXED, "warm")
        loads = []
        for clients in _LOADS:
            on_step(f"a server with {clients} clients")
            seen = []
            for number in range(_ROUNDS):
                readings = [await _read(http)]
                for policy in (router_pb2.SPECULATION_POLICY_OFF, router_pb2.SPECULATION_POLICY_FIXED):
                    await _take_turn(stub, clients, policy, f"{clients} {number} {policy}")
                    readings.append(await _read(http))
                seen.append(_load(*readings))
            loads.append(_Load(*(median(getattr(one, name) for one in seen) for name in _Load.__slots__)))
    return loads


async def _take_turn(stub: Any, clients: int, policy: router_pb2.SpeculationPolicy, salt: str) -> None:
    """A closed loop of so many clients, of whose prompts none is found in a cache."""

    async def client(first: int) -> None:
        for number in range(first, first + _TURNS):
            request = generation_pb2.GenerateRequest(
                temperature=0.0,
                stopping=generation_pb2.StoppingCriteria(max_new_tokens=_TOKENS, ignore_eos=True),
                response=generation_pb2.ResponseOptions(output_token_ids=True),
                speculation=router_pb2.Speculation(policy=policy, draft_tokens=_DRAFTS),
                cache_salt=salt,
            )
            request.chat.messages.add(role="user", content=_PROMPT.format(number=number))
            async for _ in stub.GenerateStream(request):
                pass

    await asyncio.gather(*(client(_TURNS * number) for number in range(clients)))


async def _read(http: httpx.AsyncClient) -> _Reading:
    page = (await http.get("/metrics")).raise_for_status().text
    return _Reading(_parsed(page), time.process_time())


def _parsed(page: str) -> _Samples:
    matches = filter(None, map(_SAMPLE.match, page.splitlines()))
    return tuple((m["name"], m["labels"], float(m["value"])) for m in matches)


def _load(before: _Reading, between: _Reading, after: _Reading) -> _Load:
    """From what changed while decoding was plain, and while it was not."""

    def plain(name: str, label: str = "") -> float:
        return between.total(name, label) - before.total(name, label)

    def drafted(name: str, label: str = "") -> float:
        return after.total(name, label) - between.total(name, label)

    def mean(name: str, label: str = "") -> float:
        return drafted(f"{name}_sum", label) / max(1.0, drafted(f"{name}_count", label))

    phases = "dflash_ray_target_phase_seconds"
    steps = plain(f"{phases}_count", 'phase="forward"')
    cpu = sum(plain("process_cpu_seconds_total", f'process="{kind}-') for kind in ("gateway", "router"))
    cpu += between.client_cpu - before.client_cpu
    passes = sum(mean(phases, f'phase="{name}"') for name in ("forward", "verify", "draft"))
    asking = mean("dflash_ray_router_draft_round_trip_seconds")
    asked = drafted("dflash_ray_router_draft_round_trip_seconds_count")
    gap = mean("dflash_ray_router_step_gap_seconds")
    gap -= asking * asked / max(1.0, drafted("dflash_ray_router_step_gap_seconds_count"))
    return _Load(
        sequences=plain("dflash_ray_target_entries_total") / steps,
        host=max(0.0, mean("dflash_ray_router_step_round_trip_seconds") - passes + max(0.0, gap)),
        ask=max(0.0, asking - mean("dflash_ray_drafter_phase_seconds", 'phase="draft"')) if asked else 0.0,
        beside=cpu / steps,
    )


def _by_sequences(loads: list[_Load], name: str) -> Times:
    """A straight line through two loads, from one sequence on."""
    few, many = loads
    low, high = getattr(few, name), max(getattr(few, name), getattr(many, name))
    slope = (high - low) / (many.sequences - few.sequences)
    return Times(at=(1, many.sequences), seconds=(max(0.0, low - slope * (few.sequences - 1)), high))
