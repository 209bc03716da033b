"""`make demo` and `make serve` as a newcomer sees them: progress, answers, one log, and an end without leftovers."""

import os
import re
import signal
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from dflash_ray.pb import generation_pb2, generation_pb2_grpc
from tests.applications import free_port
from tests.terminal import COMMAND, OnTerminal, behind_a_proxy, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
CONFIG = str(Path(__file__).parents[2] / "deployments/local_cpu.yaml")
# What Ray, Serve and the libraries below them write: levels, process names, progress bars, access logs.
CHATTER = re.compile(r"WARNING|INFO|pid=\d|it/s|raylet|GET /health|Traceback|\"level\"|registration|authentication")


def on_free_ports() -> tuple[list[str], int]:
    http, inner = free_port(), free_port()
    return ["--config", CONFIG, "--set", f"gateway.http_port={http}", "--set", f"gateway.grpc_port={inner}"], http


def started_by(pid: int) -> list[psutil.Process]:
    """Ray's processes, our replicas and ranks: all below the command."""
    return psutil.Process(pid).children(recursive=True)


def hosts_listened_on(processes: list[psutil.Process]) -> set[str]:
    """The interfaces on which any of them takes connections, whoever opened the port."""
    connections = [connection for process in processes for connection in process.net_connections("inet")]
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


def assert_all_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def test_the_demo_behind_a_proxy_shows_its_answer_a_table_and_the_logs_name_and_nothing_of_rays():
    options, _ = on_free_ports()
    done = run("demo", *options, env=behind_a_proxy(), timeout_s=400)
    assert done.returncode == 0, done.stderr
    assert not CHATTER.search(done.stdout + done.stderr)
    assert "\x1b" not in done.stdout + done.stderr

    named, *steps = done.stderr.splitlines()
    log = named.removeprefix("logs: ")
    words = [step.split()[0] for step in steps]
    assert words == ["preparing", "starting", "loading", "waiting", "comparing", "stopping"]
    prompt, *answer, header, off, on, ratio = (line.rstrip() for line in done.stdout.splitlines() if line)
    assert prompt.startswith("> Tom has 3 boxes") and answer
    assert header.split()[:2] == ["speculation", "tokens/s"]
    assert off.split()[0] == "off" and float(off.split()[2]) == 1.0
    assert on.split()[0] == "on" and float(on.split()[2]) > 1.0 and on.endswith("8 of 8")
    assert ratio.endswith("times the speed")

    logs = Path(log).read_text()
    assert "leading target group" in logs
    for noise in ("registration", "more than 30s", "GET /health", "it/s", "\x1b"):
        assert noise not in logs


@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGTERM"])
def test_serve_says_ready_with_its_addresses_and_ends_cleanly(stop, tmp_path):
    options, http_port = on_free_ports()
    options += ["--set", "gateway.grpc_port=0"]
    log = str(tmp_path / "serve.log")
    terminal = OnTerminal([*COMMAND, "serve", *options, "--log", log])
    ready = terminal.wait_for(r"ready in \d+ s: HTTP on (http://\S+), gRPC on (127.0.0.1:\d+);", timeout_s=240)
    url, grpc_address = ready.groups()
    assert url == f"http://127.0.0.1:{http_port}"
    with grpc.insecure_channel(grpc_address) as channel:
        info = generation_pb2_grpc.GenerationStub(channel).ModelInfo(generation_pb2.ModelInfoRequest(), timeout=20)
        assert info.vocab_size
    body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200
    processes = started_by(terminal.pid)
    assert len(processes) > 6
    assert hosts_listened_on(processes) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    if stop == "Ctrl-C":
        terminal.press("\x03")
    else:
        os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.exit_status(timeout_s=60) == 0
    assert not CHATTER.search(terminal.screen), terminal.screen
    assert "GET /health" not in Path(log).read_text()
    assert_all_end(processes)


@pytest.mark.parametrize("step", ["preparing", "starting Ray", "loading the model"])
def test_a_start_that_is_interrupted_leaves_nothing_running(step, tmp_path):
    options, _ = on_free_ports()
    log = str(tmp_path / "serve.log")
    # Operators that are compiled already are ready too soon to be interrupted.
    caches = {"DFLASH_RAY_KERNEL_CACHE": str(tmp_path / "kernels")} if step == "preparing" else {}
    terminal = OnTerminal([*COMMAND, "serve", *options, "--log", log], **caches)
    terminal.wait_for(rf"{step}.*?0:00:01", timeout_s=120)  # Ray's own processes are on their way
    processes = started_by(terminal.pid)
    assert processes
    terminal.press("\x03")
    assert terminal.exit_status(timeout_s=60) == 130
    assert "stopped" in terminal.screen and not CHATTER.search(terminal.screen), terminal.screen
    assert_all_end(processes)


def test_a_model_that_is_not_there_ends_the_start_with_its_name_and_the_logs_end(tmp_path):
    options, _ = on_free_ports()
    done = run("serve", *options, "--set", f"model.path={tmp_path / 'none'}", timeout_s=240)
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert any(line.startswith("error: ") for line in lines) and str(tmp_path / "none") in done.stderr
    assert any(line.startswith("the end of ") for line in lines)
