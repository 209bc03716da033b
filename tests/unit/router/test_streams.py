"""A stream that ends, whatever ends it, is seen by the router; what cannot be put right makes it unhealthy."""

import asyncio

import grpc
import pytest

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.pb import drafter_pb2, drafter_pb2_grpc
from dflash_ray.router.streams import open_drafter

LIMIT = 1024 * 1024


class Echo(drafter_pb2_grpc.DrafterServicer):
    """Says hello and answers every request; `ended` is set when a stream of it is over."""

    def __init__(self):
        self.ended = asyncio.Event()

    async def Draft(self, request_iterator, context):
        try:
            async for request in request_iterator:
                if request.WhichOneof("message") == "hello":
                    yield drafter_pb2.DrafterResponse(
                        hello=drafter_pb2.DrafterHelloReply(protocol_version=PROTOCOL_VERSION, drafter_id="d")
                    )
                else:
                    yield drafter_pb2.DrafterResponse(drafts=drafter_pb2.DraftReply())
        finally:
            self.ended.set()


@pytest.fixture
async def echo():
    server, servicer = grpc.aio.server(), Echo()
    drafter_pb2_grpc.add_DrafterServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield servicer
    await server.stop(0)


async def test_a_message_that_cannot_be_taken_ends_the_stream_on_both_sides_and_is_logged(echo, caplog):
    stream, _ = await open_drafter(echo.address, "r", LIMIT)
    over = asyncio.Event()

    def fail(message):
        raise ZeroDivisionError("a fault of the scheduler")

    stream.start(fail, over.set)
    stream.send(drafter_pb2.DrafterRequest(draft=drafter_pb2.DraftRequest()))
    await asyncio.wait_for(over.wait(), 30)
    await asyncio.wait_for(echo.ended.wait(), 30)
    assert "a fault of the scheduler" in caplog.text
    stream.check()  # its end was told


async def test_an_end_that_cannot_be_told_is_found_by_the_health_check(echo):
    stream, _ = await open_drafter(echo.address, "r", LIMIT)
    over = asyncio.Event()

    def fail():
        over.set()
        raise ZeroDivisionError("a fault of the scheduler")

    stream.start(lambda message: 1 / 0, fail)
    stream.send(drafter_pb2.DrafterRequest(draft=drafter_pb2.DraftRequest()))
    await asyncio.wait_for(over.wait(), 30)
    await asyncio.sleep(0)
    with pytest.raises(ZeroDivisionError, match="a fault of the scheduler"):
        stream.check()


async def test_closing_a_stream_calls_nobody(echo):
    stream, _ = await open_drafter(echo.address, "r", LIMIT)
    over = asyncio.Event()
    stream.start(lambda message: None, over.set)
    await stream.close()
    await asyncio.wait_for(echo.ended.wait(), 30)
    assert not over.is_set()
    stream.check()
