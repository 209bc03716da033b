"""What the application costs before anybody uses it: start, memory, and every process while no request comes.

    python benchmarks/footprint.py --config deployments/local_cpu.yaml

Starts `dflash-ray serve` on free ports, asks it for one answer, watches it for a while, and stops it. Memory is the
proportional set size (shared pages counted once) of all processes together. Prints figures; asserts nothing.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import typer

from dflash_ray.commands.client import stream_answer
from tests.applications import free_port

_MIB = 1024.0 * 1024.0
_SAMPLE_S = 0.5


@dataclass
class Process:
    """CPU seconds before an interval; CPU seconds and context switches in it; threads and memory at its end."""

    name: str
    start_cpu_s: float
    cpu_s: float
    switches: int
    threads: int
    pss_mib: float
    peak_rss_mib: float


@dataclass
class Memory:
    """The sum over all processes, sampled until stopped."""

    root: psutil.Process
    peak_mib: float = 0.0
    peak_of: dict[str, float] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            held: dict[str, float] = {}
            for process in family(self.root):
                try:
                    key = f"{process.pid} {name_of(process)}"
                    held[key] = pss_mib(process)
                except (psutil.Error, OSError):
                    continue
            total = sum(held.values())
            if total > self.peak_mib:
                self.peak_mib, self.peak_of = total, held

    def stop(self) -> None:
        self._stop.set()


def family(root: psutil.Process) -> list[psutil.Process]:
    return [root, *root.children(recursive=True)]


def name_of(process: psutil.Process) -> str:
    """Ray workers name themselves; of others the module or program."""
    words = process.cmdline()
    if not words:
        return process.name()
    if words[0].startswith("ray::"):
        return words[0]
    for word in words[1:4]:
        if word.endswith((".py", "dflash-ray")) or word.startswith("dflash_ray"):
            return Path(word).name
    return Path(words[0]).name


def pss_mib(process: psutil.Process) -> float:
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def counters(process: psutil.Process) -> tuple[float, int]:
    """CPU seconds and context switches so far, over all threads."""
    times = process.cpu_times()
    switches = 0
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                switches += int(line.split()[1])
    return times.user + times.system, switches


def status_kib(process: psutil.Process, key: str) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return 0


def watch_idle(root: psutil.Process, seconds: float) -> list[Process]:
    before = {process: counters(process) for process in family(root)}
    time.sleep(seconds)
    seen = []
    for process, (cpu_s, switches) in before.items():
        try:
            cpu_now, switches_now = counters(process)
            seen.append(
                Process(
                    name_of(process),
                    cpu_s,
                    cpu_now - cpu_s,
                    switches_now - switches,
                    process.num_threads(),
                    pss_mib(process),
                    status_kib(process, "VmHWM") / 1024,
                )
            )
        except (psutil.Error, OSError):
            continue
    return seen


def print_threads(root: psutil.Process, seconds: float = 10.0) -> None:
    """Which threads wake more than twice a second."""

    def switches() -> dict[tuple[str, str, str], int]:
        seen = {}
        for process in family(root):
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                status = (task / "status").read_text()
                count = sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)
                seen[name_of(process), status.split()[1], task.name] = count
        return seen

    before = switches()
    time.sleep(seconds)
    for key, count in sorted(switches().items()):
        rate = (count - before.get(key, count)) / seconds
        if rate > 2:
            print(f"{key[0]:45} {key[1]:20} {rate:7.1f}/s")


def print_row(process: Process, seconds: float) -> None:
    figures = (
        f"{process.start_cpu_s:.1f}",
        f"{100 * process.cpu_s / seconds:.2f}",
        f"{process.switches / seconds:.0f}",
        f"{process.threads}",
        f"{process.pss_mib:.0f}",
        f"{process.peak_rss_mib:.0f}" if process.peak_rss_mib else "",
    )
    print(f"| {process.name} | {' | '.join(figures)} |")


def main(
    config: Annotated[Path | None, typer.Option(help="configuration file; the defaults without")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key.sub=value")] = [],  # noqa: B006 - typer copies it
    idle_s: Annotated[float, typer.Option(help="how long it is watched without a request")] = 60.0,
    threads: Annotated[bool, typer.Option(help="also which threads wake how often")] = False,
) -> None:
    http_port, grpc_port = free_port(), free_port()
    command = [sys.executable, "-m", "dflash_ray.cli", "serve", "--log", "/tmp/footprint.log"]
    command += [] if config is None else ["--config", str(config)]
    for override in (f"gateway.http_port={http_port}", f"gateway.grpc_port={grpc_port}", *set_):
        command += ["--set", override]
    began = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    memory = Memory(psutil.Process(server.pid))
    threading.Thread(target=memory.watch, daemon=True).start()
    assert server.stdout is not None
    try:
        for line in server.stdout:
            print(f"{time.monotonic() - began:6.1f} s  {line.rstrip()}", flush=True)
            if line.startswith("ready"):
                break
        else:
            raise typer.Exit(1)
        stream_answer(f"127.0.0.1:{grpc_port}", [("user", "Hello!")], "fixed", 32, 0.0, 0, False)
        print(f"{time.monotonic() - began:6.1f} s  first answer ended")
        time.sleep(3)
        processes = watch_idle(memory.root, idle_s)
        if threads:
            print_threads(memory.root)
    finally:
        memory.stop()
        server.terminate()
        server.wait(60)
    columns = "process", "CPU s of the start", "CPU, % of a core", "switches/s", "threads", "PSS MiB", "peak RSS MiB"
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for process in sorted(processes, key=lambda p: -p.cpu_s):
        print_row(process, idle_s)
    total = Process(f"{len(processes)} processes", 0, 0, 0, 0, 0, 0)
    for process in processes:
        total.start_cpu_s += process.start_cpu_s
        total.cpu_s += process.cpu_s
        total.switches += process.switches
        total.threads += process.threads
        total.pss_mib += process.pss_mib
    print_row(total, idle_s)
    print(f"\npeak PSS of all together: {memory.peak_mib:.0f} MiB, of which")
    for name, mib in sorted(memory.peak_of.items(), key=lambda item: -item[1])[:10]:
        print(f"  {name} {mib:.0f}")


if __name__ == "__main__":
    typer.run(main)
