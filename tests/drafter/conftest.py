"""A tiny target for all drafters, and the reference package that they are compared with."""

import pytest
import torch

from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from tests.drafter.published import NUM_TARGET_LAYERS
from tests.tiny import save_tiny_target


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def target(tmp_path_factory) -> TargetCheckpoint:
    directory = tmp_path_factory.mktemp("target")
    return resolve_target(str(save_tiny_target("llama", directory, num_hidden_layers=NUM_TARGET_LAYERS)))


@pytest.fixture
def needs_reference() -> None:
    pytest.importorskip("dflash.model", reason="the reference package dflash is not installed")
