"""Where http_proxy and its like are set, every client that comes along still reaches its own server."""

import json
import subprocess
import sys
from pathlib import Path

from tests.terminal import behind_a_proxy, run

ROOT = Path(__file__).parents[2]


def test_generate_answers_behind_a_proxy(smollm2_app):
    done = run("generate", "Say hello.", "--max-tokens", "8", "--grpc", smollm2_app.grpc_address, env=behind_a_proxy())
    assert done.returncode == 0, done.stderr
    assert "8 tokens" in done.stdout


def test_status_answers_behind_a_proxy(smollm2_app):
    done = run("status", "--http", smollm2_app.http_url, env=behind_a_proxy())
    assert done.returncode == 0, done.stderr
    assert smollm2_app.config.model.served_name in done.stdout


def test_the_example_answers_behind_a_proxy(smollm2_app):
    command = [sys.executable, ROOT / "examples/grpc_client.py", "Say hello.", "--grpc", smollm2_app.grpc_address]
    done = subprocess.run(command, env=behind_a_proxy(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_benchmark_runs_behind_a_proxy(smollm2_app, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Say hello."}) + "\n")
    command = [sys.executable, ROOT / "benchmarks/served.py", "--prompts", prompts, "--max-tokens", "8"]
    command += ["--address", smollm2_app.grpc_address]
    done = subprocess.run(command, env=behind_a_proxy(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("| 0 |")
