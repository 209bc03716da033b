"""Gateways of one node listen on one gRPC port."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dflash_ray.config import NetworkConfig
from dflash_ray.rpc.channel import new_server, start_server


async def answers(port: int) -> bool:
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_second_server_shares_a_port_and_goes_on_alone_when_the_first_is_gone():
    first = await start_server(new_server(NetworkConfig().max_message_bytes), [], "127.0.0.1", 0)
    second = await start_server(new_server(NetworkConfig().max_message_bytes), [], "127.0.0.1", first.port)
    assert second.port == first.port
    assert all([await answers(first.port) for _ in range(8)])
    await first.server.stop(None)
    assert all([await answers(second.port) for _ in range(8)])
    await second.server.stop(None)
