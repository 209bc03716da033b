"""Ray gives processes the GPUs that the configuration says, shared or whole. Ray counts GPUs; none is needed."""

import os

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group

from dflash_ray.app import AppStartError, _actor_options, running_app
from dflash_ray.config import load_config
from dflash_ray.rpc.node import gpu_to_see
from dflash_ray.target_group.group import rank_options
from dflash_ray.target_group.replica import target_placement
from tests.applications import free_port

SHARED = [
    "target.device=cuda",
    "target.placement.num_gpus=0.6",
    "drafter.device=cuda",
    "drafter.placement.num_gpus=0.4",
]


class Probe:
    """In a process's place: which GPU it would compute on."""

    def gpu(self) -> str:
        given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return gpu_to_see(given, os.environ.get("CUDA_VISIBLE_DEVICES"))


@pytest.fixture
def two_gpus():
    ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


def test_ranks_have_a_gpu_each_and_drafters_what_is_left_of_them(two_gpus):
    config = load_config(None, [*SHARED, "target.tp_size=2", "drafter.num_replicas=2"])
    bundles, strategy, _ = target_placement(config)
    group = placement_group(bundles, strategy)
    ray.get(group.ready(), timeout=60)
    ranks = [ray.remote(Probe).options(**rank_options(config, group, bundle)).remote() for bundle in range(2)]
    assert sorted(ray.get([rank.gpu.remote() for rank in ranks], timeout=60)) == ["0", "1"]
    options = _actor_options(config.drafter.placement, os.environ, config.drafter.num_gpus)
    drafters = [ray.remote(Probe).options(**options).remote() for _ in range(2)]
    assert sorted(ray.get([drafter.gpu.remote() for drafter in drafters], timeout=60)) == ["0", "1"]
    assert ray.available_resources().get("GPU", 0) == pytest.approx(0, abs=1e-3)


def test_gpus_that_this_machine_does_not_have_are_said_at_once():
    ports = [f"gateway.http_port={free_port()}", f"gateway.grpc_port={free_port()}"]
    config = load_config(None, [*SHARED, "target.num_replicas=40", *ports])
    with pytest.raises(AppStartError, match=r"GPU are asked for.*target\.placement\.num_gpus 24"), running_app(config):
        pass


@pytest.mark.slow
def test_a_cluster_that_does_not_grow_is_left_after_a_while_and_what_waits_is_named(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_SLOW_STARTUP_WARNING_S", "5")  # when Serve says so, to which the cluster's own holds
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 1})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ports = [f"gateway.http_port={free_port()}", f"gateway.grpc_port={free_port()}"]
    overrides = ["target.device=cuda", "target.tp_size=2", "drafter.method=none", "target.init_timeout_s=10", *ports]
    try:
        message = r"(?s)no place in the cluster within target\.init_timeout_s \(10 s\).*Target: .*GPU"
        with pytest.raises(AppStartError, match=message), running_app(load_config(None, overrides)):
            pass
    finally:
        ray.shutdown()
        cluster.shutdown()
