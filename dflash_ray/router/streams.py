"""The router's ends of the Target and Drafter streams: a queue out, a callback in, and one call when it is over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.pb import drafter_pb2, drafter_pb2_grpc, target_pb2, target_pb2_grpc
from dflash_ray.rpc.channel import open_channel

logger = logging.getLogger(__name__)
_HELLO_TIMEOUT_S = 10.0


class Stream:
    """One bidirectional stream. Created by `open_target` or `open_drafter`, which exchange the hellos."""

    def __init__(self, address: str, method: Callable[[grpc.aio.Channel], Any], max_message_bytes: int) -> None:
        self.address = address
        self._channel = open_channel(address, max_message_bytes)
        self._outgoing: asyncio.Queue[Any] = asyncio.Queue()
        self._call = method(self._channel)(self._requests())
        self._reader: asyncio.Task[None] | None = None
        self._is_closing = False

    async def _requests(self) -> AsyncIterator[Any]:
        while True:
            yield await self._outgoing.get()

    def send(self, message: Any) -> None:
        """Queues a message; messages leave in order."""
        self._outgoing.put_nowait(message)

    async def greet(self, hello: Any) -> Any:
        """Sends the hello and returns the other side's. Raises ConnectionError when there is none in time."""
        self.send(hello)
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                reply = await self._call.read()
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            await self.close()
            raise ConnectionError(f"{self.address} did not answer the hello: {error!r}") from error
        except asyncio.CancelledError:
            await self.close()
            raise
        if reply == grpc.aio.EOF:
            await self.close()
            raise ConnectionError(f"{self.address} closed the stream: {await self._call.details()}")
        if reply.hello.protocol_version != PROTOCOL_VERSION:
            await self.close()
            raise ConnectionError(f"{self.address} speaks protocol {reply.hello.protocol_version}")
        return reply.hello

    def start(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        """Delivers every further message; `on_end` is called once, when the other side is gone.

        A message that `on_message` cannot take ends the stream as well: what follows it would be about another state.
        """
        self._reader = asyncio.create_task(self._read(on_message, on_end))

    async def _read(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        try:
            while (message := await self._call.read()) != grpc.aio.EOF:
                on_message(message)
        except grpc.aio.AioRpcError as error:
            logger.info("stream to %s ended: %s", self.address, error.details())
        except asyncio.CancelledError:
            if self._is_closing:
                return  # whoever closed it knows
            logger.info("stream to %s was cancelled", self.address)
        except Exception:
            logger.exception("a message from %s could not be taken; its stream ends", self.address)
        on_end()
        await self.close()

    def check(self) -> None:
        """Raises what ended the reader, if its end could not be told."""
        if self._reader is not None and self._reader.done() and not self._reader.cancelled():
            self._reader.result()

    async def close(self) -> None:
        """Ends the stream from this side; `on_end` is not called any more."""
        self._is_closing = True
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._call.cancel()
        await self._channel.close()


async def open_target(
    address: str, router_id: str, epoch: int, max_message_bytes: int
) -> tuple[Stream, target_pb2.TargetHelloReply]:
    """A stream that leads the group under a lease epoch. Raises ConnectionError."""
    stream = Stream(address, lambda channel: target_pb2_grpc.TargetStub(channel).Verify, max_message_bytes)
    hello = target_pb2.TargetHello(protocol_version=PROTOCOL_VERSION, router_id=router_id, epoch=epoch)
    return stream, await stream.greet(target_pb2.TargetRequest(hello=hello))


async def open_drafter(
    address: str, router_id: str, max_message_bytes: int
) -> tuple[Stream, drafter_pb2.DrafterHelloReply]:
    """A stream to a drafter. Raises ConnectionError."""
    stream = Stream(address, lambda channel: drafter_pb2_grpc.DrafterStub(channel).Draft, max_message_bytes)
    hello = drafter_pb2.DrafterHello(protocol_version=PROTOCOL_VERSION, router_id=router_id)
    return stream, await stream.greet(drafter_pb2.DrafterRequest(hello=hello))
