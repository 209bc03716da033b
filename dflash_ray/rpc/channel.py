"""grpc.aio servers and channels with one set of limits, keepalive, and the standard health and reflection services."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

# For channels to the application's own servers: http_proxy and its like say how to reach the world outside.
DIRECT: tuple[tuple[str, int], ...] = (("grpc.enable_http_proxy", 0),)

_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The server accepts pings as often as our clients send them, or it would close the connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)
# A peer that was away for a while is tried again soon after it is back, and a host that is silent is given up soon.
_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # in fact the time that an attempt may take
)


def _options(max_message_bytes: int) -> list[tuple[str, int]]:
    sizes = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
    ]
    return [*_KEEPALIVE, *sizes]


def open_channel(address: str, max_message_bytes: int) -> grpc.aio.Channel:
    """A channel to an inner server at host:port, through no proxy; the caller closes it."""
    return grpc.aio.insecure_channel(address, options=[*DIRECT, *_options(max_message_bytes), *_RECONNECT])


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A started server with its health service."""

    server: grpc.aio.Server
    health: HealthServicer
    service_names: tuple[str, ...]
    port: int

    async def set_serving(self, is_serving: bool) -> None:
        """Sets the standard health of the server and of each of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self.service_names):
            await self.health.set(name, status)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Reports NOT_SERVING, then ends calls that outlast `grace_s`."""
        await self.health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


def new_server(
    max_message_bytes: int,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    max_connection_age_s: float | None = None,
) -> grpc.aio.Server:
    """A server without services or ports; add servicers, then call `start_server`.

    Args:
        max_connection_age_s: a connection of this age takes no new calls, so that its client connects anew; running
            calls end as they would have.
    """
    # Servers of several processes may listen on one port: gateways of a node, and an old and a new one in an upgrade.
    options = [*_options(max_message_bytes), ("grpc.so_reuseport", 1)]
    if max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", int(max_connection_age_s * 1000)))
    return grpc.aio.server(options=options, interceptors=list(interceptors))


async def start_server(server: grpc.aio.Server, service_names: Sequence[str], host: str, port: int) -> RunningServer:
    """Adds health and reflection, binds host:port (0: any free port) and starts.

    Raises:
        RuntimeError: the address cannot be bound; the text names it.
    """
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((*service_names, reflection.SERVICE_NAME, "grpc.health.v1.Health"), server)
    address = format_address(host, port)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise RuntimeError(f"gRPC cannot listen on {address}; is the port in use? ({error})") from None
    await server.start()
    running = RunningServer(server, health, tuple(service_names), bound)
    await running.set_serving(True)
    return running


def format_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def local_address(host: str, port: int) -> str:
    """Where a client on this machine reaches a server that listens on `host`; for a wildcard the loopback interface."""
    return format_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
