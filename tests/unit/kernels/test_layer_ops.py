"""What stands between a layer's products: the CUDA kernels against plain torch, and a row alone and in company."""

import pytest
import torch

from dflash_ray.kernels import build, layer_ops
from tests.unit.kernels.libraries import load_emulated

HEADS, KV_HEADS, SIZE, WIDTH, EPS = 6, 2, 10, 70, 1e-5
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return "cpu" if request.param == "emulated" else "cuda"


@pytest.fixture
def compiled(device, monkeypatch):
    """Makes layer_ops call the kernels."""
    if device == "cuda":
        return lambda: None
    if not build.is_loaded_for("cpu"):
        pytest.skip("no compiler: the kernels cannot be emulated here")
    load_emulated()

    def use() -> None:
        monkeypatch.setattr(layer_ops, "_operators", torch.ops.dflash_ray_emulated)
        monkeypatch.setattr(layer_ops, "_is_compiled_for", lambda rows: True)

    return use


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_near(one: torch.Tensor, other: torch.Tensor) -> None:
    """Within two places of the type: sums are made in another order."""
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other.to(one.device), rtol=4 * torch.finfo(one.dtype).eps, atol=1e-5)


def add_norm(rows: int, dtype, has_delta: bool, has_after: bool, device: str = "cpu"):
    hidden, delta = (normal(7, WIDTH, dtype=dtype, seed=seed, device=device)[:rows].clone() for seed in (1, 2))
    after, weight = (normal(WIDTH, seed=seed, device=device) for seed in (3, 4))
    out = layer_ops.add_norm(hidden, delta if has_delta else None, after if has_after else None, weight, EPS, 0.3)
    return out, hidden


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("has_delta", "has_after"), [(False, False), (True, False), (True, True)])
def test_a_norm_takes_along_what_is_added_before_it(dtype, has_delta, has_after, device, compiled):
    expected = add_norm(7, dtype, has_delta, has_after)
    compiled()
    found = add_norm(7, dtype, has_delta, has_after, device)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)
    alone = add_norm(2, dtype, has_delta, has_after, device)
    assert all(torch.equal(one, part[:2]) for one, part in zip(alone, found, strict=True))


def turned(rows: int, dtype, has_norms: bool, device: str = "cpu"):
    qkv = normal(5, (HEADS + 2 * KV_HEADS) * SIZE, dtype=dtype, seed=1, device=device)[:rows].clone()
    norms = [normal(SIZE, seed=seed, device=device) if has_norms else None for seed in (2, 3)]
    turns = [normal(5, SIZE, seed=seed, device=device)[:rows].contiguous() for seed in (4, 5)]
    caches = [torch.zeros(20, KV_HEADS, SIZE, dtype=dtype, device=device) for _ in range(2)]
    slots = torch.tensor([7, 0, 19, 3, 4], device=device)[:rows]
    layer_ops.turn_and_store(qkv, *norms, *turns, slots, *caches, EPS)
    return qkv[:, : HEADS * SIZE], *(cache[slots] for cache in caches), *caches


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_heads_are_normed_and_turned_and_keys_and_values_stored(dtype, has_norms, device, compiled):
    expected = turned(5, dtype, has_norms)
    compiled()
    found = turned(5, dtype, has_norms, device)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)
    alone = turned(2, dtype, has_norms, device)
    assert all(torch.equal(one, part[:2]) for one, part in zip(alone[:3], found[:3], strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("is_gelu", [False, True])
def test_gates_are_activated_and_multiplied(dtype, is_gelu, device, compiled):
    gate_up = 3 * normal(5, 2 * WIDTH, dtype=dtype, seed=1)
    gate_up[0, :2] = torch.tensor([-60.0, 60.0])
    expected = layer_ops.activate(gate_up, is_gelu)
    compiled()
    found = layer_ops.activate(gate_up.to(device), is_gelu)
    assert_near(found, expected)
    assert torch.equal(layer_ops.activate(gate_up[:2].to(device), is_gelu), found[:2])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("side", [0, 1])
def test_rows_are_convolved_along_their_block_alone(dtype, side, device, compiled):
    taps, groups, block = 3, 7, 4
    x, base = normal(3 * block, WIDTH, dtype=dtype, seed=1), normal(2, taps, WIDTH, seed=3)
    coefficients = normal(3 * block, 2 * taps * groups, dtype=dtype, seed=2)
    expected = layer_ops.convolve(x, coefficients, base, side, block)
    compiled()
    found = layer_ops.convolve(x.to(device), coefficients.to(device), base.to(device), side, block)
    assert_near(found, expected)
    own = slice(block, 2 * block)
    alone = layer_ops.convolve(x[own].to(device), coefficients[own].to(device), base.to(device), side, block)
    assert torch.equal(alone, found[own])


def test_steps_without_rows_and_rows_of_another_size_are_met_with_nothing_and_an_error(device, compiled):
    compiled()
    assert len(layer_ops.activate(torch.empty(0, 8, device=device), False)) == 0
    assert len(layer_ops.add_norm(torch.empty(0, 8, device=device), None, None, normal(8, device=device), EPS, 1)) == 0
    with pytest.raises(RuntimeError, match="of 8 values and not 9"):
        layer_ops.add_norm(torch.empty(2, 8, device=device), None, None, normal(9, device=device), EPS, 1.0)
    with pytest.raises(RuntimeError, match="no heads of 4"):
        cache = torch.zeros(3, 1, 4, device=device)
        turns = normal(1, 4, device=device)
        slots = torch.zeros(1, dtype=torch.int64, device=device)
        layer_ops.turn_and_store(torch.zeros(1, 9, device=device), None, None, turns, turns, slots, cache, cache, EPS)


def test_the_operators_pass_torchs_checks():
    if not build.is_loaded_for("cpu"):
        pytest.skip("no compiler: the kernels cannot be emulated here")
    load_emulated()
    operators = torch.ops.dflash_ray_emulated
    torch.library.opcheck(operators.add_norm.default, (normal(3, 8), normal(3, 8), None, normal(8), EPS, 1.0))
    torch.library.opcheck(operators.activate.default, (normal(3, 8), True))
    torch.library.opcheck(operators.convolve.default, (normal(4, 8), normal(4, 8), normal(2, 2, 8), 1, 2))
    caches = [torch.zeros(3, 1, 4) for _ in range(2)]
    arguments = (normal(2, 12), None, None, normal(2, 4), normal(2, 4), torch.tensor([2, 0]), *caches, EPS)
    torch.library.opcheck(operators.turn_and_store.default, arguments)
