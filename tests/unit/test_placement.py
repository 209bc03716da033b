"""What processes ask of Ray, which numbers of GPUs are refused, and which GPU a process sees."""

import pytest

from dflash_ray.config import ConfigError, load_config
from dflash_ray.placement import demands, what_is_missing
from dflash_ray.rpc.node import gpu_to_see
from dflash_ray.target_group.rank import RankPlace
from dflash_ray.target_group.replica import target_placement

CUDA = ["target.device=cuda", "drafter.device=cuda"]


@pytest.mark.parametrize(
    ("overrides", "target", "drafter"),
    [
        ([], 0, 0),
        (CUDA, 1, 1),
        ([*CUDA, "target.placement.num_gpus=0.6", "drafter.placement.num_gpus=0.4"], 0.6, 0.4),
        (["target.device=cuda", "target.placement.num_gpus=0.3"], 0.3, 0),
    ],
)
def test_a_process_on_cuda_gets_a_gpu_or_the_fraction_that_it_is_given(overrides, target, drafter):
    config = load_config(None, ["target.tp_size=1", *overrides])
    assert (config.target.num_gpus, config.drafter.num_gpus) == (target, drafter)
    (bundle,), _, _ = target_placement(config)
    assert bundle.get("GPU", 0) == target
    assert [need["GPU"] for need in demands(config)["drafter"]] == [drafter]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*CUDA, "target.placement.num_gpus=0"], r"target\.placement\.num_gpus: target\.device is cuda; give 1"),
        ([*CUDA, "drafter.placement.num_gpus=0"], r"drafter\.placement\.num_gpus: drafter\.device is cuda; give 1"),
        (["target.placement.num_gpus=1"], r"target\.placement\.num_gpus: target\.device is cpu.*set it to cuda"),
        (["drafter.placement.num_gpus=0.5"], r"drafter\.placement\.num_gpus: drafter\.device is cpu"),
        ([*CUDA, "target.placement.num_gpus=2"], r"target\.placement\.num_gpus: .*target\.tp_size"),
        (
            [*CUDA, "target.tp_size=2", "target.placement.num_gpus=0.5"],
            r"target\.placement\.num_gpus: NCCL takes no two ranks .* more than 0\.5",
        ),
        (
            ["drafter.device=cuda", "drafter.placement_mode=colocated"],
            r"drafter\.device: .*target\.device is cpu; set both",
        ),
    ],
)
def test_gpus_that_a_process_cannot_have_or_use_are_refused_with_key_and_fix(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_a_colocated_drafter_asks_for_no_gpu_of_its_own():
    config = load_config(None, [*CUDA, "drafter.placement_mode=colocated", "drafter.placement.num_gpus=0"])
    assert "drafter" not in demands(config)


@pytest.mark.parametrize(
    ("given", "visible", "seen"),
    [
        (["0"], "0", "0"),  # as Ray leaves it
        (["3"], "3", "3"),
        (["2"], None, "2"),  # Ray was told to leave the variable alone
        (["2"], "0,1,2,3", "2"),
        (["GPU-5f", "GPU-6a"], "GPU-6a,GPU-5f", "GPU-5f"),
    ],
)
def test_a_process_sees_no_gpu_but_the_one_that_ray_gave_it(given, visible, seen):
    assert gpu_to_see(given, visible) == seen


@pytest.mark.parametrize(("given", "visible", "message"), [([], "0", "num_gpus"), (["1"], "0", "hides it")])
def test_a_process_without_its_gpu_says_why(given, visible, message):
    with pytest.raises(RuntimeError, match=message):
        gpu_to_see(given, visible)


def test_every_rank_computes_on_device_0_of_the_gpus_that_it_sees_and_counts_its_node_on_a_cpu():
    places = [RankPlace(rank, 4, rank % 2, False) for rank in range(4)]
    assert [place.local_rank("cuda") for place in places] == [0, 0, 0, 0]
    assert [place.local_rank("cpu") for place in places] == [0, 1, 0, 1]


def test_what_a_cluster_does_not_have_is_named_with_the_keys_that_ask_for_it():
    config = load_config(None, [*CUDA, "target.tp_size=2", "drafter.num_replicas=2", "drafter.placement.num_gpus=0.5"])
    assert what_is_missing(config, {"CPU": 8, "GPU": 3}) == ""
    text = what_is_missing(config, {"CPU": 8, "GPU": 2})
    assert text.startswith("3 GPU are asked for and the cluster has 2")
    assert "target.placement.num_gpus 2" in text and "drafter.placement.num_gpus 1" in text
    assert "resources.drafter" in what_is_missing(
        load_config(None, ["drafter.placement.resources={drafter: 1}"]), {"CPU": 8}
    )
