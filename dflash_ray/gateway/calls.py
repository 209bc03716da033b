"""Calls at routers, and the thread that makes text of what comes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from dflash_ray.gateway.token_chunks import TokenChunk

Made = TypeVar("Made")


class Listener(Protocol[Made]):
    """Whoever opened a call."""

    def make(self, chunk: TokenChunk, /) -> Made:
        """What is wanted of a chunk; called on the text thread, chunk after chunk."""

    def on_chunk(self, chunk: TokenChunk, made: Made) -> None:
        """The next chunk, with what was made of it."""

    def on_failure(self, error: Exception) -> None:
        """The call has ended with an error: a RequestError, or whatever `make` raised."""


class Call(Generic[Made]):
    """One request at one router.

    Args:
        cancel: called with the id when nobody listens any more.
    """

    def __init__(self, call_id: int, listener: Listener[Made], cancel: Callable[[int], None]) -> None:
        self.id = call_id
        self.listener: Listener[Made] | None = listener
        self._cancel = cancel

    def close(self) -> None:
        """Frees the sequence, unless the call has ended; the listener hears nothing more."""
        self.listener = None
        self._cancel(self.id)


News = Sequence[tuple[Call[Any], TokenChunk | Exception]]


class TextThread:
    """One job for each message of a router, with all calls in it. Jobs, and so a call's chunks, keep their order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text")

    def submit(self, news: News) -> None:
        """Makes what the calls' listeners want of their chunks, and tells them, or of the error that ends a call."""
        self._thread.submit(_make, news, asyncio.get_running_loop())

    def close(self) -> None:
        """Drops what is not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _make(news: News, loop: asyncio.AbstractEventLoop) -> None:
    made: list[tuple[Call[Any], TokenChunk | Exception, Any]] = []
    for call, chunk in news:
        listener = call.listener
        if listener is None:
            continue
        if isinstance(chunk, Exception):
            made.append((call, chunk, None))
            continue
        try:
            made.append((call, chunk, listener.make(chunk)))
        except Exception as fault:  # its neighbours are not concerned
            made.append((call, fault, None))
    loop.call_soon_threadsafe(_deliver, made)


def _deliver(made: Sequence[tuple[Call[Any], TokenChunk | Exception, Any]]) -> None:
    for call, chunk, result in made:
        listener = call.listener
        if listener is None:
            continue
        if isinstance(chunk, Exception):
            call.close()
            listener.on_failure(chunk)
        else:
            listener.on_chunk(chunk, result)
