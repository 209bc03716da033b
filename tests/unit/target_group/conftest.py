"""A rank of one, in this process: the real model path through DeepSpeed, without Ray."""

from collections.abc import Iterator

import pytest
import torch

from dflash_ray.config import load_config
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.tensor_parallel import create_store, init_process_group
from tests.tiny import save_tiny_target

CONFIG = load_config(None, ["target.kv_cache_tokens=2048", "target.page_size=4", "model.max_model_len=256"])


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    init_process_group(create_store("127.0.0.1", 1, 60), 0, 1, "cpu", True, 0)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def tiny_target(request, tmp_path_factory) -> TargetCheckpoint:
    return resolve_target(str(save_tiny_target(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture
def rank_model(process_group, tiny_target) -> RankModel:
    return RankModel(tiny_target, CONFIG, 0, 1)


@pytest.fixture
def runner(rank_model) -> GroupRunner:
    return GroupRunner(rank_model, SingleRank())
