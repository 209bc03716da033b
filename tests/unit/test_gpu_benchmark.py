"""benchmarks/gpu.py works on the day that a GPU is there: the same code, tiny and on a CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def run_tiny(file: Path, parts: list[str]) -> tuple[dict, str]:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--tiny", "--parts", ",".join(parts), "--json", file]
    done = subprocess.run(command, check=True, timeout=500, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    return json.loads(file.read_text()), done.stdout


def test_every_part_in_one_process_gives_figures_and_those_known_are_among_them(gpu, tmp_path):
    result, table = run_tiny(tmp_path / "figures.json", [part for part in gpu.PARTS if part != "application"])
    assert result["failed"] == {}
    figures = result["figures"]
    assert all(value > 0 for name, value in figures.items() if not name.startswith("texts"))
    assert all(f"| {name} |" in table for name in figures)
    elsewhere = ("prefill", "texts", "application")  # named by how much of it a GPU is given
    assert {name for name in gpu.KNOWN if not name.startswith(elsewhere)} <= figures.keys()
    assert [value for name, value in figures.items() if name.startswith("texts")] == [0, 0]


def test_a_part_that_fails_is_named_and_the_others_go_on(gpu, monkeypatch, capsys):
    def fail(self):
        yield "half of it", 1.0
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu.EngineBench, "steps", fail)
    result = gpu.measure(["steps", "floor"], is_tiny=True)
    assert result["failed"] == {"steps": "RuntimeError('no such kernel')"}
    assert {"half of it", "floor of a step, ms"} <= result["figures"].keys()
    assert "| steps | failed | | |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_application_answers_alike_with_speculation_on_and_off(tmp_path):
    result, _ = run_tiny(tmp_path / "figures.json", ["application"])
    assert result["failed"] == {}
    assert {name for name in result["figures"] if "2 clients" in name} == {
        "application, 2 clients, off, tokens/s", "application, 2 clients, on, tokens/s",
        "application, 2 clients, answers that differ",
    }  # fmt: skip
    assert all(value == 0 for name, value in result["figures"].items() if name.endswith("differ"))
