"""One gateway's stream to one router, with all of its calls there in it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

import grpc

from dflash_ray.core.errors import DeadlineExceededError, OtherModelError, UnavailableError
from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.gateway.calls import Call, Listener, Made, TextThread
from dflash_ray.gateway.token_chunks import TokenChunk, unpack
from dflash_ray.pb import router_pb2, router_pb2_grpc

logger = logging.getLogger(__name__)
_MAX_TOKENS = 1 << 18  # a message to the router ends with the request that makes it this large


class _Open:
    """A call that has not ended."""

    __slots__ = ("call", "model_fingerprint", "timer")

    def __init__(self, call: Call[Any], model_fingerprint: str, timer: asyncio.TimerHandle) -> None:
        self.call = call
        self.model_fingerprint = model_fingerprint
        self.timer = timer


class RouterStream:
    """Opened by its constructor, and of no use any more when it has ended: its calls have failed by then.

    Args:
        on_greeted: called when the router has answered the hello.

    Attributes:
        ended_by: why there is no stream any more; None while there is.
    """

    def __init__(self, channel: grpc.aio.Channel, text: TextThread, on_greeted: Callable[[], None]) -> None:
        self._text = text
        self._on_greeted = on_greeted
        self._open: dict[int, _Open] = {}
        self._ids = count(1)
        hello = router_pb2.GatewayHello(protocol_version=PROTOCOL_VERSION)
        self._outgoing = deque([router_pb2.RouterRequest(hello=hello)])
        self._num_tokens = 0  # of the last message
        self._has_outgoing = asyncio.Event()
        self._has_outgoing.set()
        self.ended_by: str | None = None
        self._call = router_pb2_grpc.RouterStub(channel).Generate(self._messages())
        self._reader = asyncio.create_task(self._read())

    @property
    def num_open(self) -> int:
        """Calls that have not ended."""
        return len(self._open)

    def open(self, request: router_pb2.GenerateTokensRequest, timeout_s: float, listener: Listener[Made]) -> Call[Made]:
        """Sends a request; the listener hears what comes of it."""
        call = Call(next(self._ids), listener, self._cancel)
        timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, call.id)
        self._open[call.id] = _Open(call, request.model_fingerprint, timer)
        message = self._next_message(len(request.token_ids))
        message.open.add(call_id=call.id, timeout_ms=math.ceil(1000 * timeout_s), request=request)
        return call

    def _cancel(self, call_id: int) -> None:
        """Nobody waits for the call any more; one that has ended is passed over."""
        if self._forget(call_id) is not None:
            self._next_message().cancel.append(call_id)

    def _next_message(self, num_tokens: int = 0) -> router_pb2.RouterRequest:
        """The message that leaves as soon as the router takes it, for so many tokens more."""
        if not self._outgoing or self._num_tokens > _MAX_TOKENS:
            self._outgoing.append(router_pb2.RouterRequest())
            self._num_tokens = 0
        self._num_tokens += num_tokens
        self._has_outgoing.set()
        return self._outgoing[-1]

    async def _messages(self) -> AsyncIterator[router_pb2.RouterRequest]:
        while True:
            await self._has_outgoing.wait()
            message = self._outgoing.popleft()
            if not self._outgoing:
                self._has_outgoing.clear()
            yield message

    def _forget(self, call_id: int) -> _Open | None:
        opened = self._open.pop(call_id, None)
        if opened is not None:
            opened.timer.cancel()
        return opened

    def _expire(self, call_id: int) -> None:
        """The router ends the call as well, if it can."""
        opened = self._forget(call_id)
        if opened is not None:
            self._text.submit([(opened.call, DeadlineExceededError("the request's time is over"))])

    async def _read(self) -> None:
        reason = "the router ended the stream"
        try:
            while (message := await self._call.read()) != grpc.aio.EOF:
                self._take(message)
            reason = await self._call.details() or reason
        except grpc.aio.AioRpcError as error:
            reason = error.details() or reason
        except asyncio.CancelledError:
            reason = "the stream was closed"
        except ConnectionError as error:
            reason = str(error)
        except Exception:
            logger.exception("a message of a router could not be taken; its stream ends")
        self._call.cancel()
        self.ended_by = reason
        # After what came before, which is still on its way through the text thread.
        calls = [opened.call for opened in map(self._forget, list(self._open)) if opened is not None]
        if calls:
            self._text.submit([(call, UnavailableError(reason)) for call in calls])

    def _take(self, message: router_pb2.RouterResponse) -> None:
        if message.WhichOneof("message") == "hello":
            if message.hello.protocol_version != PROTOCOL_VERSION:
                raise ConnectionError(f"the router speaks protocol {message.hello.protocol_version}")
            self._on_greeted()
            return
        news: list[tuple[Call[Any], TokenChunk | Exception]] = []
        for call_id, chunk in unpack(message.progress):
            opened = self._open.get(call_id)
            if opened is None:
                continue  # cancelled meanwhile
            if isinstance(chunk, Exception) or chunk.finish_reason:
                self._forget(call_id)
            elif chunk.model_fingerprint and opened.model_fingerprint not in ("", chunk.model_fingerprint):
                self._cancel(call_id)
                news.append((opened.call, OtherModelError("the router went on with another model")))
                continue
            news.append((opened.call, chunk))
        if news:
            self._text.submit(news)

    async def close(self) -> None:
        """Ends all calls."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
