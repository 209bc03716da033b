"""Packed weights: small where the floats allow it, the same floats to the bit, the same products in any form."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflash_ray.kernels import build

pytestmark = pytest.mark.skipif(
    not build.is_loaded_for("cpu"), reason="no C++ compiler: operators run in plain torch here"
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(1)).float()


def blocks(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-precision scales and offsets [outputs, blocks, 1] as quantised checkpoints have them."""
    shape = (outputs, inputs // 32, 1)
    return (normal(*shape) * 0.01).half().float(), (normal(*shape, seed=2) * 0.1).half().float()


def int4(outputs: int, inputs: int) -> torch.Tensor:
    scale, offset = blocks(outputs, inputs)
    return (scale.abs() * integers(0, 15, outputs, inputs // 32, 32) + offset).flatten(1)


def int8(outputs: int, inputs: int) -> torch.Tensor:
    scale, _ = blocks(outputs, inputs)
    q = integers(-126, 126, outputs, inputs // 32, 32)
    q[..., 5] = 127  # the largest of a block is a whole step of its scale
    return (scale * q).flatten(1)


def bfloat16(outputs: int, inputs: int) -> torch.Tensor:
    return normal(outputs, inputs).bfloat16().float()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FORMS = {"int4": (int4, 0.2), "int8": (int8, 0.3), "bfloat16": (bfloat16, 0.55), "float32": (normal, 1.1)}


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    packed = torch.ops.dflash_ray.pack_linear(weight)
    return torch.ops.dflash_ray.packed_linear(x, packed, None, len(weight))


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_takes_no_more_room_than_its_floats_need(form):
    make, fraction = FORMS[form]
    weight = make(128, 320)
    assert torch.ops.dflash_ray.pack_linear(weight).nbytes < fraction * weight.nbytes


@pytest.mark.parametrize("form", FORMS)
@given(outputs=st.integers(1, 70), blocks=st.integers(1, 5))
def test_a_packed_weight_gives_back_every_float(form, outputs, blocks):
    weight = FORMS[form][0](outputs, 32 * blocks)
    assert torch.equal(product(torch.eye(32 * blocks), weight), weight.T)


@pytest.mark.parametrize("form", ["int4", "int8", "bfloat16"])
@given(rows=st.integers(1, 20), outputs=st.integers(1, 70), blocks=st.integers(1, 5))
def test_a_product_is_the_same_bit_for_bit_in_every_form(form, rows, outputs, blocks):
    weight, x = FORMS[form][0](outputs, 32 * blocks), normal(rows, 32 * blocks, seed=3)
    beside_others = torch.cat([weight, normal(1, 32 * blocks, seed=4)])  # which only float32 holds
    assert torch.equal(product(x, weight), product(x, beside_others)[:, :outputs])


def chains(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x W^T [rows, outputs], each one chain of fused multiply-adds in float32 over the inputs in their order."""
    sums = np.zeros((len(x), len(weight)), dtype=np.float32)
    for k in range(x.shape[1]):
        products = np.outer(x[:, k].astype(np.float64), weight[:, k].astype(np.float64))  # exact
        total = products + sums
        lost = (products - (total - (total - products))) + (sums - (total - products))
        # Rounded to odd where it is not exact, so that rounding it once more rounds the exact sum.
        is_even = (total.view(np.int64) & 1) == 0
        total = np.where(is_even & (lost != 0), np.nextafter(total, np.copysign(np.inf, lost)), total)
        sums = total.astype(np.float32)
    return sums


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [*range(1, 18), 97, 109])
def test_every_output_is_one_chain_of_fused_multiply_adds_whatever_the_rows(form, rows):
    weight, x = FORMS[form][0](83, 160), normal(rows, 160, seed=3)
    assert np.array_equal(product(x, weight).numpy(), chains(x.numpy(), weight.numpy()))


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_blocks_of_one_value_and_of_zeros_are_held(form):
    weight = FORMS[form][0](40, 96)
    weight[3, :32], weight[4, 32:64] = 0.0, weight[4, 32]
    assert torch.equal(product(torch.eye(96), weight), weight.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-30, -0.0])
def test_unusual_floats_are_held(value):
    weight = int4(40, 64)
    weight[39, 63] = value
    row = torch.zeros(1, 64)
    row[0, 63] = 1.0
    got = product(row, weight)[0]
    assert torch.equal(got[:39], weight[:39, 63])
    assert torch.equal(got[39].nan_to_num(7.0), weight[39, 63].nan_to_num(7.0))


def test_weights_keep_their_floats_while_others_come_and_go():
    weights = [normal(outputs, 96, seed=outputs) for outputs in (70, 5, 33, 64)]
    kept = [torch.ops.dflash_ray.pack_linear(weight) for weight in weights]
    del kept[1], weights[1]
    kept.append(torch.ops.dflash_ray.pack_linear(int4(40, 96)))
    for weight, packed in zip([*weights, int4(40, 96)], kept, strict=True):
        got = torch.ops.dflash_ray.packed_linear(torch.eye(96), packed, None, len(weight))
        assert torch.equal(got, weight.T)


def test_the_memory_of_weights_that_are_gone_is_used_again():
    weight = normal(1024, 1024)
    before = resident_bytes()
    for _ in range(100):
        torch.ops.dflash_ray.pack_linear(weight)
    assert resident_bytes() - before < 50 * weight.nbytes


def test_a_weight_of_another_type_is_refused():
    with pytest.raises(RuntimeError, match=r"a weight is float32 \[out, in\]"):
        torch.ops.dflash_ray.pack_linear(torch.zeros(3, 4, dtype=torch.float64))
