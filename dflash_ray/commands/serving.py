"""`serve` and `demo`: start the application on this machine or on the cluster of RAY_ADDRESS."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from dflash_ray.commands.client import Answer, console, fail, stream_answer
from dflash_ray.config import ConfigError, DflashRayConfig, load_config
from dflash_ray.rpc.channel import local_address

_READY_TIMEOUT_S = 300.0
_DEMO_PROMPTS = (
    "Tom has 3 boxes with 12 pencils each. He gives away 9 pencils. How many pencils are left?",
    "A recipe for 4 people needs 300 g of flour. How much flour is needed for 10 people?",
    "Write a Python function that checks whether a string is a palindrome.",
    "Explain to a ten-year-old why the sky is blue.",
)
_DEMO_TOKENS = 96
_DEMO_ROUNDS = 2


def _load(config_path: Path | None, overrides: list[str]) -> DflashRayConfig:
    try:
        return load_config(config_path, overrides)
    except ConfigError as error:
        fail(str(error))


def _wait_until_ready(url: str) -> None:
    """Returns when GET /health answers 200."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # the proxy is still starting
        time.sleep(0.2)
    fail(f"{url}/health was not 200 within {_READY_TIMEOUT_S:.0f} s; see the logs above")


@contextmanager
def _running(config: DflashRayConfig) -> Iterator[None]:
    """The running application; ends the command with a clear text when it does not start."""
    from dflash_ray.app import AppStartError, running_app

    try:
        with running_app(config):
            yield
    except AppStartError as error:
        fail(str(error))


def run_serve(config_path: Path | None, overrides: list[str]) -> None:
    """Runs until SIGINT or SIGTERM."""
    config = _load(config_path, overrides)
    stop = threading.Event()
    with _running(config):
        http = f"http://{local_address(config.gateway.http_host, config.gateway.http_port)}"
        address = local_address(config.gateway.grpc_host, config.gateway.grpc_port)
        _wait_until_ready(http)
        body = f'{{"model": "{config.model.served_name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        console.print("ready", style="bold green")
        console.out(f"HTTP     curl {http}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")
        console.out(f"gRPC     python examples/grpc_client.py --grpc {address} 'Hello!'")
        console.out(f"metrics  curl {http}/metrics")
        console.out("stop     Ctrl-C")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        console.print("stopping")


def run_demo(config_path: Path | None, overrides: list[str]) -> None:
    """Answers real prompts with speculation off and on, interleaved, and prints what differs: the speed alone."""
    config = _load(config_path, overrides)
    console.print("starting (weights are loaded, about a minute) ...")
    with _running(config):
        _wait_until_ready(f"http://{local_address(config.gateway.http_host, config.gateway.http_port)}")
        address = local_address(config.gateway.grpc_host, config.gateway.grpc_port)
        console.print(f"[bold]> {_DEMO_PROMPTS[0]}[/bold]")
        _answer(address, _DEMO_PROMPTS[0], "fixed", show=True)
        answers: dict[str, list[Answer]] = {"off": [], "fixed": []}
        for _ in range(_DEMO_ROUNDS):
            for prompt in _DEMO_PROMPTS:
                for speculation, collected in answers.items():
                    collected.append(_answer(address, prompt, speculation, show=False))
    _report(answers["off"], answers["fixed"])


def _answer(address: str, prompt: str, speculation: str, show: bool) -> Answer:
    return stream_answer(address, [("user", prompt)], speculation, _DEMO_TOKENS, 0.0, 0, show)


def _report(off: list[Answer], on: list[Answer]) -> None:
    equal = sum(a.token_ids == b.token_ids for a, b in zip(off, on, strict=True))
    speed_off = statistics.median(answer.tokens_per_second for answer in off)
    speed_on = statistics.median(answer.tokens_per_second for answer in on)
    ratio = statistics.median(b.tokens_per_second / a.tokens_per_second for a, b in zip(off, on, strict=True))
    steps = sum(answer.metrics.num_spec_steps for answer in on)
    accepted = sum(answer.metrics.num_accepted_draft_tokens for answer in on)
    console.print(f"speculation off  {speed_off:6.1f} tokens/s")
    console.print(
        f"speculation on   {speed_on:6.1f} tokens/s  ({ratio:.2f}x, acceptance length {1 + accepted / steps:.2f})"
    )
    console.print(f"tokens equal     {equal} of {len(off)} answers")
    if equal < len(off):
        fail("speculation changed tokens; run the equality tests (make test) to see whether these are near-ties")
