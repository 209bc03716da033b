"""`serve` and `demo`: start the application on this machine or on the cluster of RAY_ADDRESS."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx

from dflash_ray.commands.client import Answer, stream_answer
from dflash_ray.commands.terminal import Steps, console, fail, logs_kept_apart, new_table, notes
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


def run_serve(config_path: Path | None, overrides: list[str], log: str | None) -> None:
    """Runs until SIGINT or SIGTERM."""
    config = _load(config_path, overrides)
    began = time.monotonic()
    with logs_kept_apart("serve", log), Steps() as steps, _running(config, steps):
        http, grpc = _http_url(config), _grpc_address(config)
        seconds = time.monotonic() - began
        console.out(f"ready in {seconds:.0f} s: HTTP on {http}, gRPC on {grpc}; Ctrl-C stops", style="bold green")
        body = f'{{"model": "{config.model.served_name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        notes.out(f"try: curl {http}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


def run_demo(config_path: Path | None, overrides: list[str], log: str | None) -> None:
    """Answers real prompts with speculation off and on, interleaved, and prints what differs: the speed alone."""
    config = _load(config_path, overrides)
    with logs_kept_apart("demo", log), Steps() as steps:
        answers: dict[str, list[Answer]] = {"off": [], "fixed": []}
        with _running(config, steps):
            address = _grpc_address(config)
            console.out(f"> {_DEMO_PROMPTS[0]}", style="bold")
            _answer(address, _DEMO_PROMPTS[0], "fixed", show=True)
            total = _DEMO_ROUNDS * len(_DEMO_PROMPTS) * len(answers)
            steps.begin(f"comparing {len(_DEMO_PROMPTS)} answers with speculation off and on, {_DEMO_ROUNDS} times")
            for prompt in _DEMO_PROMPTS * _DEMO_ROUNDS:
                for speculation, collected in answers.items():
                    collected.append(_answer(address, prompt, speculation, show=False))
                    steps.say(f"{sum(map(len, answers.values()))} of {total}")
        steps.end()
        _report(answers["off"], answers["fixed"])


@contextmanager
def _running(config: DflashRayConfig, steps: Steps) -> Iterator[None]:
    """The running application, ready for requests; ends the command with a clear text when it does not start."""
    # As Ctrl-C does, so that nothing goes on running after either.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    joins_cluster = "RAY_ADDRESS" in os.environ  # whose machines compile for themselves
    with nullcontext() if joins_cluster else _compiling() as compiling:
        from dflash_ray.app import AppStartError, require_free_ports, running_app

        try:
            if compiling is not None:
                require_free_ports(config)
                steps.begin("preparing the operators (the first time they are compiled: a minute or two)")
                _wait_until_compiled(compiling)
            with running_app(config, on_step=steps.begin):
                steps.begin("waiting until it can answer")
                _wait_until_ready(_http_url(config))
                steps.end()
                yield
        except AppStartError as error:
            fail(str(error))


@contextmanager
def _compiling() -> Iterator[subprocess.Popen[str]]:
    """Compiles what the processes would otherwise compile while they start, beside what is done meanwhile.

    In a process of its own: this one has no use for torch.
    """
    command = [sys.executable, "-m", "dflash_ray.cli", "kernels", "build"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def _wait_until_compiled(process: subprocess.Popen[str]) -> None:
    """The application can do without the operators, slower."""
    _, errors = process.communicate()
    print(errors, end="", file=sys.stderr)
    if process.returncode != 0:
        reason = next((line for line in errors.splitlines() if line.startswith("error:")), "see the log")
        notes.out(f"the operators run in plain torch, which is slower: they could not be compiled ({reason})")


def _http_url(config: DflashRayConfig) -> str:
    """The HTTP API, as this machine reaches it."""
    from dflash_ray.rpc.node import bind_host

    return f"http://{local_address(bind_host(config.gateway.http_host), config.gateway.http_port)}"


def _grpc_address(config: DflashRayConfig) -> str:
    """The same of the gRPC API of the running application."""
    from dflash_ray.rpc.node import bind_host

    return local_address(bind_host(config.gateway.grpc_host), config.gateway.grpc_port or _grpc_port())


def _grpc_port() -> int:
    """The port that the running gateway was given."""
    from dflash_ray.rpc.directory import DirectoryClient

    [entry, *_] = asyncio.run(DirectoryClient().entries("gateway"))
    port: int = entry.info["grpc_port"]
    return port


def _wait_until_ready(url: str) -> None:
    """Returns when GET /health answers 200."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    answer = "no answer"
    with httpx.Client(timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                response = client.get(f"{url}/health")
            except httpx.TransportError as error:  # the proxy is still starting
                answer = str(error)
            else:
                if response.status_code == 200:
                    return
                answer = f"{response.status_code} {response.text}"
            time.sleep(0.2)
    fail(f"{url}/health was not 200 within {_READY_TIMEOUT_S:.0f} s, but: {answer}")


def _answer(address: str, prompt: str, speculation: str, show: bool) -> Answer:
    return stream_answer(address, [("user", prompt)], speculation, _DEMO_TOKENS, 0.0, 0, show)


def _report(off: list[Answer], on: list[Answer]) -> None:
    equal = sum(a.token_ids == b.token_ids for a, b in zip(off, on, strict=True))
    table = new_table("speculation", "tokens/s", "tokens a target pass", "answers equal to off")
    table.add_row("off", f"{_speed(off):.1f}", f"{_tokens_a_pass(off):.2f}", "")
    table.add_row("on", f"{_speed(on):.1f}", f"{_tokens_a_pass(on):.2f}", f"{equal} of {len(off)}")
    console.print()
    console.print(table)
    console.print(f"{_speed(on) / _speed(off):.2f} times the speed")
    if equal < len(off):
        fail("speculation changed tokens, which on a CPU it must never do; please report this with the log")


def _speed(answers: list[Answer]) -> float:
    """Tokens a second after each answer's first, over all of them."""
    return sum(len(answer.token_ids) - 1 for answer in answers) / sum(answer.seconds for answer in answers)


def _tokens_a_pass(answers: list[Answer]) -> float:
    steps = sum(answer.stats.num_spec_steps for answer in answers)
    return 1 + sum(answer.stats.num_accepted_draft_tokens for answer in answers) / steps
