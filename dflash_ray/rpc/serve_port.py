"""Where the port listens that Serve opens in every replica, for calls between deployments."""

from __future__ import annotations

from typing import Any

import ray
from ray._common import tls_utils
from ray.serve._private import replica


def bind_serve_port() -> None:
    """Has it listen on this node's own address, where Serve takes all interfaces and has no option.

    It takes pickled calls. To be called while the replica is being made: Serve opens the port after that. It rests on
    a name inside Serve, whose version is pinned; a test looks at the ports.
    """
    host = str(ray.util.get_node_ip_address())
    host = f"[{host}]" if ":" in host else host

    def add_port(server: Any, address: str) -> int:
        port: int = tls_utils.add_port_to_grpc_server(server, address.replace("[::]", host))
        return port

    vars(replica)["add_port_to_grpc_server"] = add_port
