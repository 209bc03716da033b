"""Replicas follow the busy fraction."""

from types import SimpleNamespace

import pytest

from dflash_ray.drafter.autoscaling import METRIC, BusyFractionPolicy


def wanted(fractions: list[float], current: int | None = None) -> int:
    metrics = {METRIC: {f"replica-{i}": value for i, value in enumerate(fractions)}}
    context = SimpleNamespace(target_num_replicas=current or len(fractions), aggregated_metrics=metrics)
    return BusyFractionPolicy(target_busy_fraction=0.6)(context)[0]


def test_busy_replicas_get_help_and_idle_ones_leave():
    assert wanted([0.95]) == 2
    assert wanted([0.9, 0.9]) == 3
    assert wanted([0.1, 0.2, 0.1]) == 1


def test_a_load_near_the_target_changes_nothing():
    assert wanted([0.62, 0.58]) == 2


def test_without_figures_the_number_stays():
    assert wanted([], current=2) == 2


def test_at_least_one_replica_stays():
    assert wanted([0.0]) == 1


def test_a_target_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="target_busy_fraction"):
        BusyFractionPolicy(target_busy_fraction=0)
