"""An application without a cluster has an instance of Ray of its own, whatever else runs on the machine."""

import subprocess
import sys

import pytest
from ray.cluster_utils import Cluster

START = """
import ray
from dflash_ray.ray_instance import start_instance

start_instance("test", num_cpus=3)
print("at", ray.get_runtime_context().gcs_address, int(ray.cluster_resources()["CPU"]))
ray.shutdown()
"""


@pytest.mark.slow
def test_a_cluster_of_somebody_else_is_left_alone():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        [found] = [line for line in done.stdout.splitlines() if line.startswith("at ")]  # Ray says more
        address, num_cpus = found.split()[1:]
        assert address != cluster.address and num_cpus == "3"
    finally:
        cluster.shutdown()
