"""benchmarks/host.py goes through every part of the host as it is."""

from __future__ import annotations

import importlib
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
    parts = {*host.CRITICAL, *host.ASIDE} - {"rank"}
    assert {name for name, ms in figures.ms.items() if ms > 0} == parts
    assert figures.bytes.keys() == set(host.WIRES)
    assert all(figures.bytes.values())


def test_other_ranks_report_theirs(host):
    figures = host.run(replace(host.QUICK, tp=2), steps=2)
    assert figures.ms["rank"] > 0
