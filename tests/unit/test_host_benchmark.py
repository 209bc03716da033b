"""benchmarks/host.py goes through every part of the host as it is."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("host")


@pytest.mark.parametrize("penalties", [False, True])
async def test_every_part_and_every_wire_reports_a_figure(host, penalties):
    figures = await host.measure(replace(host.QUICK, penalties=penalties), steps=2)
    parts = {*host.CRITICAL, *host.ASIDE} - {"rank", "rank counts", "target to ranks"}
    assert {name for name, ms in figures.ms.items() if ms > 0} == parts
    assert figures.bytes.keys() == set(host.WIRES)
    assert all(figures.bytes.values())


def test_it_runs_quickly_as_a_script_with_other_ranks_and_writes_its_figures(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / "host.py", "--quick", "--json", file]
    subprocess.run(command, check=True, timeout=400, capture_output=True, cwd=BENCHMARKS.parent)
    alone, ranked = json.loads(file.read_text())
    assert alone["case"]["tp"] == 1 and alone["total"] >= alone["critical"] > 0
    assert ranked["case"]["tp"] == 2 and ranked["ms"]["rank"] > 0 and ranked["ms"]["target to ranks"] > 0
