"""What serving adds to a step, from a server's counters before and after."""

import pytest

from dflash_ray.simulator.serving import _load, _parsed, _Reading

PHASES = "dflash_ray_target_phase_seconds"


def page(plain_steps: int, drafted_steps: int) -> _Reading:
    """Counters after so many steps of 4 sequences; a drafted one of two asks the drafter."""
    steps = plain_steps + drafted_steps
    asked = drafted_steps / 2
    lines = {
        f'{PHASES}_count{{process="target-a",phase="forward"}}': steps,
        f'{PHASES}_sum{{process="target-a",phase="forward"}}': 0.020 * plain_steps + 0.030 * drafted_steps,
        f'{PHASES}_count{{process="target-a",phase="verify"}}': steps,
        f'{PHASES}_sum{{process="target-a",phase="verify"}}': 0.002 * steps,
        f'{PHASES}_count{{process="target-a",phase="draft"}}': steps,
        f'{PHASES}_sum{{process="target-a",phase="draft"}}': 0.0,
        'dflash_ray_target_entries_total{process="target-a",status="OK"}': 4 * steps,
        'process_cpu_seconds_total{process="gateway-b"}': 0.003 * steps,
        'process_cpu_seconds_total{process="router-c"}': 0.004 * steps,
        'process_cpu_seconds_total{process="target-a"}': 0.040 * steps,
        'dflash_ray_router_step_round_trip_seconds_sum{process="router-c"}': 0.034 * steps,
        'dflash_ray_router_step_round_trip_seconds_count{process="router-c"}': steps,
        'dflash_ray_router_step_gap_seconds_sum{process="router-c"}': 0.001 * drafted_steps + 0.012 * asked,
        'dflash_ray_router_step_gap_seconds_count{process="router-c"}': drafted_steps,
        'dflash_ray_router_draft_round_trip_seconds_sum{process="router-c"}': 0.012 * asked,
        'dflash_ray_router_draft_round_trip_seconds_count{process="router-c"}': asked,
        'dflash_ray_drafter_phase_seconds_sum{process="drafter-d",phase="draft"}': 0.010 * asked,
        'dflash_ray_drafter_phase_seconds_count{process="drafter-d",phase="draft"}': asked,
    }
    text = "\n".join(["# HELP a b", *(f"{name} {value}" for name, value in lines.items())])
    return _Reading(_parsed(text), 0.002 * steps)


def test_a_step_is_taken_apart():
    load = _load(page(10, 6), page(110, 6), page(110, 46))
    assert load.sequences == pytest.approx(4)
    assert load.beside == pytest.approx(0.003 + 0.004 + 0.002)
    assert load.ask == pytest.approx(0.012 - 0.010)
    assert load.host == pytest.approx(0.034 - 0.032 + 0.001)


def test_a_colocated_drafter_is_not_asked():
    readings = [page(10, 6), page(110, 6), page(110, 46)]
    readings = [
        _Reading(tuple(sample for sample in one.samples if "draft_round_trip" not in sample[0]), one.client_cpu)
        for one in readings
    ]
    assert _load(*readings).ask == 0.0
