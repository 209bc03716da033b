"""`drain`: a Ray node lets its answers end before it is stopped. The preStop hook of every pod runs it.

Serve starts the node's replicas elsewhere, where there is room, and stops those here once the answers that they give
have ended. Where there is no room they go on until the deadline, or until the whole cluster is going away and idle.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx
import ray

from dflash_ray.commands.terminal import console, fail
from dflash_ray.rpc.channel import format_address

_POLL_S = 2.0
_OTHERS_START_S = 10.0  # pods that are deleted together do not run their hooks at the same moment
_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Node:
    """The node to drain, and where its cluster answers."""

    id: str
    ip: str
    is_head: bool
    gcs_address: str
    dashboard_url: str


def run_drain(timeout_s: float, node_id: str | None) -> None:
    """Returns when nothing on the node is needed any more, after `timeout_s` at the latest."""
    os.environ["NO_PROXY"] = "*"  # everything asked here is in the cluster
    node = _find_node(node_id)
    deadline = time.monotonic() + timeout_s
    if node.is_head:
        time.sleep(min(_OTHERS_START_S, timeout_s))
    else:
        _announce(node, timeout_s)
    idle_polls = 0
    while time.monotonic() < deadline:
        try:
            details = _serve_details(node)
        except (ConnectionError, RuntimeError) as error:  # the head may be on its way out, too
            console.print(f"the state of the application is not known, draining goes on: {error}")
            time.sleep(_POLL_S)
            continue
        if is_drained(details, node):
            console.print("drained")
            return
        idle_polls = idle_polls + 1 if is_leaving(details) and _num_requests(details, node) == 0 else 0
        if idle_polls > 1:
            console.print("the cluster is going away and idle")
            return
        time.sleep(_POLL_S)
    console.print(f"not drained within {timeout_s:.0f} s")


def is_drained(details: dict[str, Any], node: Node) -> bool:
    """Whether the node serves nobody; the head holds no replicas, and stays as long as others are draining."""
    replicas = _replicas(details)
    if node.is_head:
        return not any(replica["state"] in ("PENDING_MIGRATION", "STOPPING") for replica in replicas)
    # A replica that has not started has no node yet.
    return node.id not in {replica.get("node_id") for replica in replicas} | set(details.get("proxies", {}))


def is_leaving(details: dict[str, Any]) -> bool:
    """Whether every node with replicas is draining, as when a cluster is deleted."""
    return all(replica["state"] != "RUNNING" for replica in _replicas(details))


def _replicas(details: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        replica
        for application in details.get("applications", {}).values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
    ]


def _num_requests(details: dict[str, Any], node: Node) -> float | None:
    """Requests running and waiting in the whole application, None where it does not say."""
    address = format_address(node.ip, (details.get("http_options") or {}).get("port", 8000))
    try:
        response = httpx.get(f"http://{address}/metrics", timeout=10, trust_env=False).raise_for_status()
    except httpx.HTTPError:
        return None
    values = _REQUESTS.findall(response.text)
    return sum(map(float, values)) if values else None


def _find_node(node_id: str | None) -> Node:
    try:
        context = ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError) as error:
        fail(f"there is no Ray node to drain here: {error}")
    runtime = ray.get_runtime_context()
    node_id = node_id or runtime.get_node_id()
    known = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    gcs_address = runtime.gcs_address
    ray.shutdown()  # a driver would be one more thing that runs on the node
    if node_id not in known:
        fail(f"--node {node_id}: no such node is alive; those that are: {', '.join(known)}")
    is_head = "node:__internal_head__" in known[node_id]["Resources"]
    return Node(node_id, known[node_id]["NodeManagerAddress"], is_head, gcs_address, f"http://{context.dashboard_url}")


def _announce(node: Node, timeout_s: float) -> None:
    """Nothing new comes to the node, and Serve moves what is there."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", node.gcs_address]
    command += ["--node-id", node.id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "the node is about to be stopped"]
    command += ["--deadline-remaining-seconds", str(int(timeout_s))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        fail(f"the node cannot be drained: {result.stderr.strip().splitlines()[-1]}")


def _serve_details(node: Node) -> dict[str, Any]:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    details: dict[str, Any] = ServeSubmissionClient(node.dashboard_url).get_serve_details()
    return details
