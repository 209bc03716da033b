"""A node that is drained under load, as a pod is by its preStop hook: its streams end whole, its replicas move."""

import asyncio
import os
import sys

import pytest
import ray
from ray.cluster_utils import Cluster

from dflash_ray.app import running_app
from dflash_ray.config import load_config
from tests.applications import PROMPTS, Application, Client, free_port, request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MAX_NEW_TOKENS = 100


@pytest.fixture
def cluster(monkeypatch):
    """A head for targets and drafters, and one frontend node; a second one joins later."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S", "2")
    head = {
        "num_cpus": 4,
        "resources": {"target": 1, "drafter": 2},
        "include_dashboard": True,
        "dashboard_port": free_port(),
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.frontend = cluster.add_node(num_cpus=2, resources={"frontend": 1})
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


async def drain(node_id: str) -> str:
    command = [sys.executable, "-m", "dflash_ray.cli", "drain", "--timeout", "120", "--node", node_id]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=os.environ.copy()
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode().strip().splitlines()[-1]


async def test_streams_of_a_drained_frontend_end_whole_and_others_are_served_by_the_next(cluster):
    ports = [f"gateway.http_port={free_port()}", f"gateway.grpc_port={free_port()}", "gateway.drain_timeout_s=100"]
    placement = [
        "gateway.placement={num_cpus: 0.1, resources: {frontend: 0.5}}",
        "router.placement={num_cpus: 0.1, resources: {frontend: 0.5}}",
        "target.placement={num_cpus: 1, resources: {target: 1}}",
        "drafter.placement={num_cpus: 0.5, resources: {drafter: 1}}",
    ]
    config = load_config(None, [*ports, *placement])
    with running_app(config):
        prompts = [prompt["prompt"] for prompt in PROMPTS[:3]]
        messages = [request(prompt, max_new_tokens=MAX_NEW_TOKENS) for prompt in prompts]
        for message in messages:
            message.stopping.ignore_eos = True
        async with Client(Application(config).grpc_address) as client:
            undisturbed = [(await client.generate(message)).token_ids for message in messages]
            streams = [asyncio.create_task(client.generate(message)) for message in messages]
            await asyncio.sleep(1.0)
            cluster.add_node(num_cpus=2, resources={"frontend": 1})
            assert await drain(cluster.frontend.node_id) == "drained"
            assert [output.token_ids for output in await asyncio.gather(*streams)] == undisturbed
        cluster.remove_node(cluster.frontend)
        async with Client(Application(config).grpc_address) as client:
            assert (await client.generate(messages[0])).token_ids == undisturbed[0]
