"""Target ranks and drafters on nodes of their own give the tokens of one node."""

from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from dflash_ray.config import load_config
from dflash_ray.rpc.directory import DirectoryClient
from tests.applications import PROMPTS, Application, Client, free_port, request
from tests.reference import Comparison

DEPLOYMENT = Path(__file__).parents[2] / "deployments/multi_node.yaml"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(monkeypatch):
    """Five nodes on this machine: a frontend, two for ranks, two for drafters."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "resources": {"frontend": 1}})
    for resources in ({"target": 1}, {"target": 1}, {"drafter": 1}, {"drafter": 1}):
        cluster.add_node(num_cpus=2, resources=resources)
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


async def test_ranks_and_drafters_on_different_nodes_answer_as_transformers_does(cluster, reference):
    from dflash_ray.app import running_app

    ports = [f"gateway.http_port={free_port()}", f"gateway.grpc_port={free_port()}"]
    # All nodes share one machine, where the loopback interface is the one that all of them can bind.
    loopback = ["network.bind_host=127.0.0.1", "gateway.grpc_host=127.0.0.1"]
    config = load_config(DEPLOYMENT, [*ports, *loopback])
    with running_app(config):
        directory = DirectoryClient()
        targets, drafters = [await directory.entries(kind) for kind in ("target", "drafter")]
        assert len(set(targets[0].info["node_ids"])) == 2
        assert len({drafter.info["node_id"] for drafter in drafters} | set(targets[0].info["node_ids"])) == 4
        comparison = Comparison()
        async with Client(Application(config).grpc_address) as client:
            for prompt in PROMPTS[14:20]:
                ids = reference.chat_ids(prompt["prompt"])
                output = await client.generate(request(ids))
                comparison.add(reference, prompt["prompt"], ids, reference.greedy(ids, 24), output.token_ids)
        assert not comparison.different and comparison.equal
