"""One application for all client programs, which run in an environment of their own (`make clients`)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.applications import Application, application

ROOT = Path(__file__).parents[2]
BIN = Path(os.environ.get("DFLASH_RAY_CLIENTS", ROOT / ".venv-clients")) / "bin"
Run = Callable[..., str]


@pytest.fixture(scope="session")
def app() -> Iterator[Application]:
    with application() as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a program of the clients' environment; returns what it prints."""

    def run_program(program: str, *args: str | Path) -> str:
        if not (BIN / program).exists():
            pytest.skip(f"{BIN / program} is not installed; `make clients` installs it")
        # Nothing is looked up outside: neither models nor data sets.
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "OPENAI_API_KEY": "none",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "PYTHONPATH": "",
        }
        done = subprocess.run(
            [BIN / program, *args],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    return run_program
