"""The implementations of the verification operators that are held against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from dflash_ray.kernels import build
from tests.unit.kernels.libraries import load_emulated
from tests.unit.kernels.plans import torch_operator


class Implementation(NamedTuple):
    """How to call it, and where its tensors live."""

    operator: Callable[..., Any]
    device: str


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)], scope="session")
def implementation(request) -> Implementation:
    """The CPU operators, the CUDA kernels under emulation, and on a GPU the CUDA kernels themselves."""
    if not build.is_loaded_for("cuda" if request.param == "cuda" else "cpu"):
        pytest.skip("no compiler: operators run in plain torch here")
    if request.param == "emulated":
        load_emulated()
        return Implementation(torch_operator("dflash_ray_emulated"), "cpu")
    return Implementation(torch_operator("dflash_ray"), request.param)
