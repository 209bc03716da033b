"""benchmarks/host.py goes through every part of the host as it is."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
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
    parts = {*host.CRITICAL, *host.ASIDE} - {"rank", "target to ranks"}
    assert {name for name, ms in figures.ms.items() if ms > 0} == parts
    assert figures.bytes.keys() == set(host.WIRES)
    assert all(figures.bytes.values())


def run_two_ranks() -> dict[str, float]:
    """In a process of its own: rank 0's is in no other group."""
    sys.path.insert(0, str(BENCHMARKS))
    host = importlib.import_module("host")
    return host.run(replace(host.QUICK, tp=2), steps=2).ms


def test_other_ranks_report_theirs():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        figures = pool.submit(run_two_ranks).result(timeout=240)
    assert figures["rank"] > 0 and figures["target to ranks"] > 0
