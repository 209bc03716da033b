"""When a node may go, by what Serve says of its replicas and proxies."""

from dflash_ray.commands.drain import Node, is_drained, is_leaving

WORKER = Node("w", "10.0.0.7", False, "10.0.0.1:6379", "http://10.0.0.1:8265")
HEAD = Node("h", "10.0.0.1", True, "10.0.0.1:6379", "http://10.0.0.1:8265")


def details(replicas: dict[str, list[tuple[str, str]]], proxies: tuple[str, ...]) -> dict:
    """As Serve's REST API answers: deployments with (node, state) of their replicas, and nodes with a proxy.

    What has no place yet says no node.
    """
    deployments = {
        name: {"replicas": [{"state": state} | ({"node_id": node} if node else {}) for node, state in places]}
        for name, places in replicas.items()
    }
    return {"applications": {"dflash_ray": {"deployments": deployments}}, "proxies": {node: {} for node in proxies}}


def test_a_worker_stays_until_its_replicas_and_its_proxy_are_gone():
    moving = {"Gateway": [("w", "PENDING_MIGRATION"), ("", "STARTING")], "Target": [("t", "RUNNING")]}
    assert not is_drained(details(moving, ("h", "w", "t")), WORKER)
    moved = {"Gateway": [("x", "RUNNING")], "Target": [("t", "RUNNING")]}
    assert not is_drained(details(moved, ("h", "w", "x", "t")), WORKER), "the proxy still carries answers"
    assert is_drained(details(moved, ("h", "x", "t")), WORKER)


def test_the_head_stays_while_others_drain_and_goes_when_it_alone_is_stopped():
    assert not is_drained(details({"Gateway": [("w", "STOPPING")]}, ("h", "w")), HEAD)
    assert not is_drained(details({"Gateway": [("w", "PENDING_MIGRATION")]}, ("h", "w")), HEAD)
    assert is_drained(details({"Gateway": [("w", "RUNNING")]}, ("h", "w")), HEAD)


def test_a_cluster_is_leaving_when_no_replica_stays():
    leaving = {"Gateway": [("w", "STOPPING")], "Target": [("t", "PENDING_MIGRATION"), ("", "STARTING")]}
    assert is_leaving(details(leaving, ("h", "w", "t")))
    leaving["Target"].append(("u", "RUNNING"))
    assert not is_leaving(details(leaving, ("h", "w", "t", "u")))
    assert is_drained({"applications": {}}, WORKER)
