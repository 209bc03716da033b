"""The size of a KV cache that is left to the program: the arithmetic, its bounds, and what depends on it."""

import numpy as np
import pytest
import torch

from dflash_ray.config import ConfigError, load_config
from dflash_ray.target_group.cache_size import (
    GIB,
    Memory,
    check_tokens,
    cpu_budget,
    cuda_budget,
    device_memory,
    host_memory,
    most_tokens,
    rank_budget,
    tokens_that_fit,
)
from dflash_ray.target_group.model import RankModel
from tests.unit.target_group.test_model import logits

AUTO = ["target.kv_cache_tokens=auto", "drafter.method=none"]


def test_a_gpu_gives_what_is_free_less_the_reserve_and_the_logits_of_a_pass():
    budget = cuda_budget(Memory(60 * GIB, 80 * GIB, 16 * GIB), 1.0, 1024, 131072, 0)
    assert budget.num_bytes == 60 * GIB - GIB - GIB
    assert "60.00 GiB free" in budget.arithmetic and "2.00 GiB in reserve" in budget.arithmetic


def test_passes_of_fixed_shapes_are_taken_off_what_a_gpu_gives():
    memory = Memory(60 * GIB, 80 * GIB, 16 * GIB)
    without, with_passes = (cuda_budget(memory, 1.0, 1024, 131072, num_bytes) for num_bytes in (0, 3 * GIB))
    assert with_passes.num_bytes == without.num_bytes - 3 * GIB
    assert "3.00 GiB for passes of fixed shapes" in with_passes.arithmetic


def test_a_fraction_of_a_gpu_gives_that_fraction_less_what_the_process_holds():
    budget = cuda_budget(Memory(60 * GIB, 80 * GIB, 16 * GIB), 0.5, 1024, 131072, 0)
    assert budget.num_bytes == 40 * GIB - 16 * GIB - 2 * GIB
    assert cuda_budget(Memory(60 * GIB, 80 * GIB, 16 * GIB), 0.1, 1024, 131072, 0).num_bytes == 0


def test_a_cpu_gives_a_share_divided_among_the_ranks_of_the_machine():
    assert cpu_budget(Memory(16 * GIB, 32 * GIB, 0), 2).num_bytes == 2 * GIB


def test_tokens_are_whole_pages_and_no_more_than_can_be_used():
    budget = cpu_budget(Memory(4 * GIB, 4 * GIB, 0), 1)
    assert tokens_that_fit(budget, 1024 * 1024, 16, None) == 1024
    assert tokens_that_fit(budget, 1_000_000, 16, None) == 1072
    assert tokens_that_fit(budget, 1024 * 1024, 16, 500) == 512


def test_what_all_sequences_can_fill_bounds_a_cpu_and_not_a_gpu():
    cpu, cuda = (
        load_config(None, [*AUTO, f"target.device={device}", "router.max_running=8"]) for device in ("cpu", "cuda")
    )
    assert (most_tokens(cpu, 1000), most_tokens(cuda, 1000)) == (8000, None)


def test_no_room_is_said_with_the_arithmetic_and_the_way_out():
    budget = cpu_budget(Memory(GIB, GIB, 0), 1)
    with pytest.raises(ValueError, match=r"kv_cache_tokens: auto finds room for 32 tokens.*1\.00 GiB.*tp_size"):
        check_tokens(32, budget, 8 * 1024 * 1024)


def test_a_containers_limit_counts_where_it_is_less_than_the_machine(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n")
    assert host_memory(tmp_path) == Memory(4 * GIB, 8 * GIB, 0)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert host_memory(tmp_path) == Memory(4 * GIB, 8 * GIB, 0)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{2 * GIB}\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text(f"{GIB}\n")
    assert host_memory(tmp_path) == Memory(GIB, 2 * GIB, 0)


def test_this_machine_has_memory():
    budget = rank_budget(load_config(None, AUTO), 1000, 1, 0)
    assert budget.num_bytes > 0 and "available" in budget.arithmetic


def test_a_model_without_a_cache_is_given_one_and_then_computes_as_any_other(tiny_target):
    sizes = ["target.page_size=4", "model.max_model_len=256"]
    model = RankModel(tiny_target, load_config(None, [*AUTO, *sizes]), 0, 1)
    assert model.max_model_len == 256
    assert model.cache_row_bytes == 2 * 4 * 3 * 8 * 4  # keys and values, layers, heads, their size, float32
    model.allocate_cache(50, 4)
    assert model.max_model_len == 200
    known = RankModel(tiny_target, load_config(None, ["target.kv_cache_tokens=200", *sizes]), 0, 1)
    entry = (np.arange(9).tolist(), 0, [0, 1, 2])
    assert torch.equal(logits(model, entry), logits(known, entry))


def test_drafters_elsewhere_must_be_told_how_much_they_hold():
    with pytest.raises(ConfigError, match=r"drafter\.max_context_tokens: with target\.kv_cache_tokens auto"):
        load_config(None, ["target.kv_cache_tokens=auto"])
    load_config(None, ["target.kv_cache_tokens=auto", "drafter.max_context_tokens=4096"])
    colocated = load_config(None, ["target.kv_cache_tokens=auto", "drafter.placement_mode=colocated"])
    assert colocated.with_kv_cache_tokens(640).drafter_context_tokens == 640


def test_where_a_number_is_needed_auto_is_refused_by_name():
    config = load_config(None, AUTO)
    assert config.sequence_limit(None) == config.model.max_model_len
    with pytest.raises(ConfigError, match=r"target\.kv_cache_tokens: auto is decided where a rank starts"):
        _ = config.target.kv_cache_rows


@pytest.mark.parametrize("value", ["63", "much", "null"])
def test_neither_too_few_tokens_nor_another_word_is_taken(value):
    with pytest.raises(ConfigError, match=r"target\.kv_cache_tokens"):
        load_config(None, [f"target.kv_cache_tokens={value}"])


@pytest.mark.gpu
def test_a_gpu_tells_its_memory_and_what_this_process_holds_of_it():
    before = device_memory()
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    after = device_memory()
    assert 0 < after.free <= after.total == before.total
    assert after.own - before.own >= held.nbytes
