"""The same as host.py over real streams: gateway, router, target and drafter as processes, and nothing canned but the
model, the drafts and the directory.

`python benchmarks/host_processes.py [--sequences 1 32 256] [--seconds 4] [--json FILE]`: CPU time of each whole process
a step - event loops, gRPC's threads and garbage collection included - and the time a step takes where there are enough
cores. Prompts are short. Prints figures; asserts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from host_canned import CannedDrafts
from host_cases import DRAFTS, FINGERPRINT, Case, Clock, Texts
from host_target import Target
from rich.console import Console
from rich.table import Table

from dflash_ray.config import ModelConfig
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.servicer import DrafterServicer
from dflash_ray.gateway.generation import Generator
from dflash_ray.gateway.openai_responses import ResponseWriter
from dflash_ray.gateway.openai_types import ChatCompletionRequest
from dflash_ray.gateway.routers import Routers
from dflash_ray.observability.metrics import DrafterMetrics, GatewayMetrics, RouterMetrics, TargetMetrics
from dflash_ray.pb import drafter_pb2_grpc, router_pb2_grpc
from dflash_ray.router.pipeline import Pipeline
from dflash_ray.router.servicer import RouterServicer
from dflash_ray.rpc.channel import new_server, start_server
from dflash_ray.rpc.directory import DirectoryClient, Entry
from dflash_ray.rpc.target_service import add_target_service
from dflash_ray.target_group.servicer import TargetInfo, TargetServicer
from dflash_ray.text.tokenizer import ChatTokenizer

PROCESSES = ("gateway", "router", "target", "drafter")
WIDTH = 4096
LEAST_CONTEXT = 128


def case_of(sequences: int) -> Case:
    """Texts that can grow for as long as is measured."""
    return Case(sequences, LEAST_CONTEXT, width=WIDTH, prompt_width=WIDTH, room=max(4096, 65_536 // sequences))


class _Steps:
    """Counts the engine's steps."""

    def __init__(self, target: Target) -> None:
        self.count = 0
        inner = target.engine.step

        def step(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            return inner(*arguments, **named)

        target.engine.step = step  # type: ignore[method-assign]


def _answer(wire: Connection, count: Any = None) -> None:
    """Tells CPU time and steps so far whenever it is asked."""

    def run() -> None:
        while wire.recv():
            wire.send((time.process_time(), 0 if count is None else count.count))

    threading.Thread(target=run, daemon=True).start()


async def _serve(case: Case, add: Any, wire: Connection, count: Any = None) -> None:
    """Tells its address, and then answers for as long as the process lives."""
    server = new_server(case.config().network.max_message_bytes)
    add(server)
    running = await start_server(server, [], "127.0.0.1", 0)
    wire.send(f"127.0.0.1:{running.port}")
    _answer(wire, count)
    await running.server.wait_for_termination()


async def run_target(case: Case, wire: Connection) -> None:
    texts = Texts(case, ChatTokenizer(ModelConfig()))
    target, config = Target(case, Clock(), texts), case.config()
    info = TargetInfo(
        target_id="target",
        model_fingerprint="model",
        feature_fingerprint=FINGERPRINT,
        vocab_size=texts.tokenizer.vocab_size,
        hidden_size=case.width,
        max_model_len=config.model.max_model_len,
        page_size=config.target.page_size,
        num_pages=config.target.num_pages,
        max_batch_tokens=config.target.max_batch_tokens,
        tp_size=1,
        colocated_draft_tokens=0,
    )
    compute, watchdog = ThreadPoolExecutor(1), Watchdog(1e6, "a pass")
    servicer = TargetServicer(target.engine, info, compute, watchdog, TargetMetrics("m"), target.features)
    steps = _Steps(target)
    await _serve(case, lambda server: add_target_service(servicer, server), wire, steps)


async def run_drafter(case: Case, wire: Connection) -> None:
    method = CannedDrafts(case, Clock(), Texts(case, ChatTokenizer(ModelConfig())))
    limit = case.config().network.max_message_bytes
    servicer = DrafterServicer("drafter", method, 2**40, limit, Watchdog(1e6, "a draft"), DrafterMetrics())
    await _serve(case, lambda server: drafter_pb2_grpc.add_DrafterServicer_to_server(servicer, server), wire)


class _OneGroup:
    """Stands for the fleet: one pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def pick(self, model_fingerprint: str = "") -> Pipeline:
        return self._pipeline


async def run_router(case: Case, wire: Connection) -> None:
    target, drafter = wire.recv()
    pipeline = Pipeline(case.config(), "router", RouterMetrics())
    await pipeline.connect_target(Entry("target", "target", target, {}), 1)
    await pipeline.connect_drafter(Entry("drafter", "drafter", drafter, {}))
    servicer = RouterServicer(_OneGroup(pipeline))  # type: ignore[arg-type]
    await _serve(case, lambda server: router_pb2_grpc.add_RouterServicer_to_server(servicer, server), wire)


async def run_gateway(case: Case, wire: Connection) -> None:
    address = wire.recv()
    tokenizer, config = ChatTokenizer(ModelConfig()), case.config()
    routers = Routers(DirectoryClient(), config.network)
    routers.update([Entry("router", "router", address, {"ready": True, "num_groups": 1, "models": ["model"]})])
    generator = Generator(routers, tokenizer, GatewayMetrics(), "model", 1e6, 1e6)
    texts = Texts(case, tokenizer)
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "."}], "stream": True})
    started = 0
    is_started = asyncio.Event()

    async def answer(index: int) -> None:
        nonlocal started
        request = texts.request(index)
        writer = ResponseWriter("chat", request.request_id, "model", tokenizer, body, [request])
        is_first = True
        async for deltas in generator.generate(request):
            for delta in deltas:
                writer.events(delta)
            if is_first and any(delta.token_ids for delta in deltas):
                is_first = False
                started += 1
                if started == case.sequences:
                    is_started.set()

    answers = [asyncio.create_task(answer(index)) for index in range(case.sequences)]
    await is_started.wait()
    wire.send("started")
    _answer(wire)
    await asyncio.gather(*answers)
    await asyncio.Event().wait()


def _process(name: str, case: Case, wire: Connection) -> None:
    torch.set_num_threads(1)
    asyncio.run(
        {"gateway": run_gateway, "router": run_router, "target": run_target, "drafter": run_drafter}[name](case, wire)
    )


def run(case: Case, seconds: float) -> dict[str, Any]:
    """Milliseconds of CPU a step for every process, and of time."""
    context = multiprocessing.get_context("spawn")
    wires: dict[str, Connection] = {}
    processes = []
    for name in reversed(PROCESSES):
        wires[name], end = context.Pipe()
        processes.append(context.Process(target=_process, args=(name, case, end), daemon=True))
        processes[-1].start()
    try:
        wires["router"].send((wires["target"].recv(), wires["drafter"].recv()))
        wires["gateway"].send(wires["router"].recv())
        wires["gateway"].recv()
        time.sleep(1.0)
        before, started = _ask(wires), time.monotonic()
        time.sleep(seconds)
        after, elapsed = _ask(wires), time.monotonic() - started
    finally:
        for process in processes:
            process.kill()
    steps = after["target"][1] - before["target"][1]
    ms = {name: 1e3 * (after[name][0] - before[name][0]) / steps for name in PROCESSES}
    return {"case": asdict(case), "ms": ms, "elapsed": 1e3 * elapsed / steps, "steps": steps}


def _ask(wires: dict[str, Connection]) -> dict[str, tuple[float, int]]:
    for wire in wires.values():
        wire.send(True)
    return {name: wire.recv() for name, wire in wires.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    options = parser.parse_args()
    results = [run(case_of(sequences), options.seconds) for sequences in options.sequences]
    table = Table("ms a step", *(f"{count} x {DRAFTS + 1}" for count in options.sequences))
    for name in PROCESSES:
        table.add_row(f"{name}, CPU", *(f"{result['ms'][name]:.2f}" for result in results))
    table.add_row("all, CPU", *(f"{sum(result['ms'].values()):.2f}" for result in results))
    table.add_row("time", *(f"{result['elapsed']:.2f}" for result in results))
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
