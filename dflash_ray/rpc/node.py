"""Which host the inner servers bind and publish."""

from __future__ import annotations

import ray


def bind_host(configured: str) -> str:
    """The interface for an inner server: `node` means this Ray node's own IP, anything else is taken as it is."""
    return str(ray.util.get_node_ip_address()) if configured == "node" else configured
