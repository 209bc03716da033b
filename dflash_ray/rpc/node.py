"""What a process has of its Ray node: the host that inner servers bind and publish, and its GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray


def bind_host(configured: str) -> str:
    """The interface for an inner server: `node` means this Ray node's own IP, anything else is taken as it is."""
    return str(ray.util.get_node_ip_address()) if configured == "node" else configured


def gpu_to_see(given: Sequence[str], visible: str | None) -> str:
    """What CUDA_VISIBLE_DEVICES must say, so that a process's one GPU is its device 0.

    Args:
        given: ids of the GPUs that Ray gave the process: indices, or UUIDs where the node's own variable has those.
        visible: the variable as it stands. Ray sets it to `given`, unless it was told to leave it alone
            (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES), and then every process would compute on the node's first GPU.

    Raises:
        RuntimeError: Ray gave no GPU, or the variable rules out the one that it gave.
    """
    if not given:
        raise RuntimeError("device is cuda, and Ray gave this process no GPU; set placement.num_gpus")
    if visible is not None and given[0] not in visible.split(","):
        raise RuntimeError(f"Ray gave this process GPU {given[0]}, and CUDA_VISIBLE_DEVICES={visible} hides it")
    return given[0]


def see_own_gpu() -> None:
    """Leaves this process the GPU that Ray gave it as its only one. Before anything initialises CUDA."""
    given = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu_to_see(given, os.environ.get("CUDA_VISIBLE_DEVICES"))
