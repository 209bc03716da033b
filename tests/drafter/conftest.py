"""A tiny target for all drafters, and the reference package that they are compared with."""

import pytest
import torch

from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from tests.drafter.published import NUM_TARGET_LAYERS
from tests.tiny import save_tiny_target

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target(tmp_path_factory) -> TargetCheckpoint:
    directory = tmp_path_factory.mktemp("target")
    return resolve_target(str(save_tiny_target("llama", directory, num_hidden_layers=NUM_TARGET_LAYERS)))


@pytest.fixture
def needs_reference() -> None:
    pytest.importorskip("dflash.model", reason="the reference package dflash is not installed")
