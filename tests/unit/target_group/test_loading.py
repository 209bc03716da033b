"""Each of two ranks, in a process of its own, reads its slices of a checkpoint: the same weights, little memory."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dflash_ray.config import load_config
from dflash_ray.core.memory import return_freed_memory
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.models.weight_files import WeightFiles
from dflash_ray.target_group.loading import RankWeights, load_rank, load_slices, load_whole
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.tensor_parallel import (
    create_store,
    init_process_group,
    join_store,
    smallest_over_ranks,
)
from tests.tiny import CONFIGS, save_tiny_target

SIZE = 2
# Tied and untied heads, biases of q, k, v, norms of other kinds, a scale in the embedding.
FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "cohere")
# 104 MiB in float32, in layers small enough that one of them is no matter.
LARGE = LlamaConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=8, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def save(config, directory: Path, **options) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory, **options)
    return str(directory)


def tensors(weights: RankWeights) -> dict[str, torch.Tensor]:
    buffers = dict(weights.base.named_buffers())
    head = {"head": weights.head(torch.eye(weights.text_config.hidden_size, dtype=weights.base.dtype))}
    return {**dict(weights.base.named_parameters()), **buffers, **head}


def differing(checkpoint: TargetCheckpoint, dtype: torch.dtype, rank: int, size: int) -> list[str]:
    """Names of what slices and whole weights do not have alike."""
    sliced = tensors(load_slices(checkpoint, dtype, rank, size, "cpu"))
    whole = tensors(load_whole(checkpoint, dtype, rank, size, "cpu"))
    names = sorted(sliced.keys() ^ whole.keys())
    return names + [name for name in sliced if name in whole and not torch.equal(sliced[name], whole[name])]


def peak_growth(load: Callable[[], RankWeights | RankModel]) -> tuple[int, Any]:
    """Bytes by which this process grew at most while something was loaded, and what that was."""
    gc.collect()
    return_freed_memory()  # else it would be used again, and not seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
    before = status_bytes("VmRSS")
    loaded = load()
    return status_bytes("VmHWM") - before, loaded


def measure(path: str, small: str, rank: int) -> tuple[int, int, int]:
    """Bytes of this rank's part of a checkpoint; growth while it is loaded whole, and as a rank does it."""
    RankModel(resolve_target(small), load_config(None), rank, SIZE)  # brings in code, which takes memory too
    checkpoint = resolve_target(path)
    whole, kept = peak_growth(lambda: load_whole(checkpoint, torch.float32, rank, SIZE, "cpu"))
    part = sum(parameter.nbytes for parameter in kept.base.parameters())
    part += kept.text_config.hidden_size * kept.text_config.vocab_size // SIZE * 4
    del kept
    return part, whole, peak_growth(lambda: RankModel(checkpoint, load_config(None), rank, SIZE))[0]


def status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run_rank(rank: int, port: int, alike: list[str], large: str, fused: str, results) -> None:
    torch.set_num_threads(1)
    init_process_group(join_store("127.0.0.1", port, SIZE, 60), rank, SIZE, "cpu", False, rank)
    differences = {
        f"{path} {dtype}": differing(resolve_target(path), dtype, rank, SIZE)
        for path in alike
        for dtype in ((torch.bfloat16,) if path != alike[0] else (torch.float32, torch.bfloat16))
    }
    sizes = measure(large, alike[0], rank)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("dflash_ray").addHandler(handler)
    logging.getLogger("dflash_ray").setLevel(logging.INFO)
    load_rank(resolve_target(fused), torch.float32, rank, SIZE, "cpu")
    assert smallest_over_ranks(7 + rank, SIZE, "cpu") == 7
    results.put((rank, differences, sizes, lines))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found, by rank."""
    folder = tmp_path_factory.mktemp("targets")
    alike = [str(save_tiny_target(kind, folder / kind)) for kind in FAMILIES]
    alike.append(save(CONFIGS["qwen2"](), folder / "sharded", max_shard_size="20KB"))
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 3
    large = save(LARGE, folder / "large")
    fused = str(save_tiny_target("phi3", folder / "phi3"))
    context = multiprocessing.get_context("spawn")
    store, results = create_store("127.0.0.1", SIZE, 60), context.Queue()
    processes = [
        context.Process(target=run_rank, args=(rank, store.port, alike, large, fused, results)) for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    found = {}
    while len(found) < SIZE:
        try:
            rank, *rest = results.get(timeout=1)
            found[rank] = rest
        except queue.Empty:
            assert all(process.exitcode in (None, 0) for process in processes), "a rank failed; see its traceback"
    for process in processes:
        process.join(timeout=30)
    return found


@pytest.mark.timeout(480)
def test_slices_are_to_the_bit_what_splitting_the_whole_model_gives(ranks):
    for differences, *_ in ranks.values():
        assert differences and not any(differences.values()), differences


def test_a_rank_takes_at_most_1_3_times_its_part_of_the_memory_while_it_loads(ranks):
    for _, (part, whole, growth), _ in ranks.values():
        assert 50e6 < part < 60e6
        assert growth < 1.3 * part < 2 * part < whole


def test_layers_that_are_split_in_another_way_are_loaded_whole_and_the_log_says_so(ranks):
    for *_, lines in ranks.values():
        assert any("each rank loads the whole model" in line and "LinearLayer" in line for line in lines), lines


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_rank_reads_what_transformers_loads(kind, tmp_path):
    checkpoint = resolve_target(str(save_tiny_target(kind, tmp_path)))
    assert differing(checkpoint, torch.bfloat16, 0, 1) == []


def test_the_index_says_which_files_are_meant(tmp_path):
    save(CONFIGS["qwen2"](), tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    save(CONFIGS["llama"](hidden_size=96), tmp_path / "other")
    (tmp_path / "other/model.safetensors").rename(tmp_path / "consolidated.safetensors")
    files = WeightFiles(tmp_path)
    assert {file.name for file in files.files} == set(index.values())
    assert files.shape("model.embed_tokens.weight") == (96, 48)


def test_a_part_that_a_tensor_does_not_have_is_refused_by_name(tmp_path):
    save_tiny_target("qwen3", tmp_path)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is of shape \[48\]"):
        WeightFiles(tmp_path).read_into(torch.empty(40), "model.norm.weight", 0, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FAMILIES)
def test_slices_go_straight_to_a_gpu_and_are_what_transformers_loads(kind, tmp_path):
    checkpoint = resolve_target(str(save_tiny_target(kind, tmp_path)))
    on_gpu = load_slices(checkpoint, torch.bfloat16, 0, 1, "cuda")
    whole = load_whole(checkpoint, torch.bfloat16, 0, 1, "cpu").base
    for name, parameter in whole.named_parameters():
        found = on_gpu.base.get_parameter(name)
        assert found.is_cuda and torch.equal(found.cpu(), parameter)
    assert all(buffer.is_cuda for buffer in on_gpu.base.buffers())
