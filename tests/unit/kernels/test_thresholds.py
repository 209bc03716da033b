"""Thresholds where a search has most to do: ties, more tokens than a list holds, top-k beyond what tiles bound."""

import pytest
import torch

from dflash_ray.kernels.columns import Mode
from tests.unit.kernels.plans import assert_same, plan_of, reference_operator, run_step

VOCAB = 9_000  # more than a list of gathered tokens holds
LIMITS = [
    {"top_k": 3},
    {"top_k": 4_000},
    {"top_k": 3, "top_p": 0.5},
    {"top_k": 4_000, "top_p": 0.5},
    {"top_p": 0.5},
    {"top_p": 0.999_999},
    {"min_p": 0.3, "top_p": 0.9},
    {"min_p": 1.0, "top_k": 20},
    {"temperature": 0.0},
    {"mode": Mode.REJECTION, "top_p": 0.7},
    {"mode": Mode.REJECTION, "top_k": 3_000},
]


def rows_of(kind: str, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(num_rows, VOCAB, generator=generator)
    if kind == "equal":
        return torch.full_like(normal, 2.5)
    if kind == "three values":
        return torch.randint(-1, 2, normal.shape, generator=generator).float()
    if kind == "around zero":  # keys of small values of both signs lie far apart
        return normal * 1e-30
    if kind == "peaked":
        return normal.pow(3) * 4
    return normal


@pytest.mark.parametrize("kind", ["equal", "three values", "around zero", "peaked", "flat"])
def test_thresholds_are_the_references(implementation, kind):
    plan = [plan_of([1, 2], seed=i, **limits) for i, limits in enumerate(LIMITS)]
    logits = rows_of(kind, 2 * len(plan))
    got = run_step(implementation.operator, logits, plan, device=implementation.device)
    assert_same(got, run_step(reference_operator, logits, plan))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_thresholds_of_infinite_and_missing_rows_are_the_references(implementation, num_shards):
    plan = [plan_of([1], seed=i, **limits) for i, limits in enumerate(LIMITS)]
    logits = rows_of("flat", len(plan))
    logits[0] = logits[4] = -torch.inf
    logits[1, :5_000] = logits[5, 10:] = -torch.inf
    logits[2, 7], logits[6, 8] = torch.inf, torch.nan
    got = run_step(implementation.operator, logits, plan, num_shards, implementation.device)
    assert_same(got, run_step(reference_operator, logits, plan))


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3])
def test_thresholds_hold_at_any_temperature(implementation, temperature):
    plan = [plan_of([1], seed=i, **({"temperature": temperature} | limits)) for i, limits in enumerate(LIMITS)]
    logits = rows_of("flat", len(plan)).to(torch.bfloat16)
    got = run_step(implementation.operator, logits, plan, device=implementation.device)
    assert_same(got, run_step(reference_operator, logits, plan))
