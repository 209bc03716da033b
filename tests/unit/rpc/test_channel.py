"""Servers on real sockets, over IPv4 and IPv6."""

import asyncio
import socket

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dflash_ray.config import ConfigError, load_config
from dflash_ray.pb import metrics_pb2, metrics_pb2_grpc
from dflash_ray.rpc.channel import format_address, local_address, new_server, open_channel, start_server

LIMIT = 1024 * 1024


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def health_of(address: str) -> int:
    async with open_channel(address, LIMIT) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
async def test_a_server_answers_at_the_address_it_publishes(host):
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    running = await start_server(new_server(LIMIT), [], host, 0)
    try:
        address = local_address(host, running.port)
        assert await health_of(address) == health_pb2.HealthCheckResponse.SERVING
    finally:
        await running.stop()


async def test_an_address_that_cannot_be_bound_is_named_with_its_brackets():
    with pytest.raises(RuntimeError, match=r"gRPC cannot listen on \[2001:db8::1\]:9000"):
        await start_server(new_server(LIMIT), [], "2001:db8::1", 9000)


def test_an_ipv6_host_stands_in_brackets():
    assert format_address("::1", 9000) == "[::1]:9000"
    assert format_address("fd00::a", 0) == "[fd00::a]:0"
    assert format_address("10.0.0.7", 9000) == "10.0.0.7:9000"
    assert local_address("::", 9000) == "[::1]:9000"


@pytest.mark.parametrize("key", ["gateway.http_host", "gateway.grpc_host", "network.bind_host"])
def test_a_host_in_brackets_is_refused_by_name(key):
    with pytest.raises(ConfigError, match=f"{key}.*without brackets"):
        load_config(None, [f"{key}='[::1]'"])


async def test_an_old_connection_is_left_for_a_new_one_and_cuts_no_running_call():
    """Clients behind a Service, which balances connections alone, come to other gateways in time."""
    peers: list[str] = []

    class Watched(metrics_pb2_grpc.MetricsServicer):
        async def Collect(self, request, context):
            peers.append(context.peer())
            await asyncio.sleep(2.0 if len(peers) == 1 else 0.0)
            return metrics_pb2.CollectResponse(text="whole")

    server = new_server(LIMIT, max_connection_age_s=0.5)
    metrics_pb2_grpc.add_MetricsServicer_to_server(Watched(), server)
    running = await start_server(server, [], "127.0.0.1", 0)
    async with open_channel(f"127.0.0.1:{running.port}", LIMIT) as channel:
        stub = metrics_pb2_grpc.MetricsStub(channel)
        for _ in range(2):
            assert (await stub.Collect(metrics_pb2.CollectRequest(), timeout=20)).text == "whole"
    await running.stop()
    assert peers[0] != peers[1]
