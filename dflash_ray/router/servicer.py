"""The Router gRPC service: one stream a gateway, with all of its calls in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from google.protobuf.message import DecodeError

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.pb import router_pb2, router_pb2_grpc
from dflash_ray.router.fleet import Fleet
from dflash_ray.router.gateway_streams import GatewayStream


class RouterServicer(router_pb2_grpc.RouterServicer):
    """Hands calls to the fleet's pipelines, and what they bring to the gateways, as fast as each takes it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._streams: set[GatewayStream] = set()

    async def Generate(
        self, request_iterator: AsyncIterator[router_pb2.RouterRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.RouterResponse]:
        stream = GatewayStream(self._fleet)
        self._streams.add(stream)
        reading = asyncio.create_task(_read(request_iterator, stream, context))
        try:
            yield router_pb2.RouterResponse(hello=router_pb2.RouterHello(protocol_version=PROTOCOL_VERSION))
            while (message := await stream.outbox.take()) is not None:
                yield message
            if reading.done() and (fault := reading.result()) is not None:
                await context.abort(*fault)
        finally:
            self._streams.discard(stream)
            reading.cancel()
            stream.close()

    def close(self) -> None:
        """Ends the streams when what waits in them has been sent; gateways take their calls elsewhere."""
        for stream in self._streams:
            stream.outbox.close()


async def _read(
    requests: AsyncIterator[router_pb2.RouterRequest], stream: GatewayStream, context: grpc.aio.ServicerContext
) -> tuple[grpc.StatusCode, str] | None:
    """Gives the gateway's messages to the stream until they end; returns what is wrong with them."""
    is_greeted = False
    try:
        async for message in requests:
            if not is_greeted and message.hello.protocol_version != PROTOCOL_VERSION:
                version = message.hello.protocol_version
                text = f"protocol_version {version} is not {PROTOCOL_VERSION}: run one release everywhere"
                return grpc.StatusCode.FAILED_PRECONDITION, text
            is_greeted = True
            stream.take(message)
    except (DecodeError, ValueError) as error:
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    finally:
        stream.outbox.close()
    return None
