"""Calls at routers, and where text is made of what comes of them: on a thread, unless it is next to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from dflash_ray.gateway.token_chunks import TokenChunk

Made = TypeVar("Made")
# Handing a message to the thread and back takes two wake-ups, a tenth of a millisecond: as long as the text of so many
# calls' next tokens.
_FEW_CALLS = 4
_FEW_TOKENS = 32


class Listener(Protocol[Made]):
    """Whoever opened a call."""

    def make(self, chunk: TokenChunk, /) -> Made:
        """What is wanted of a chunk; called chunk after chunk, on the text thread or the event loop's."""

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
    """One job for each message of a router, with all calls in it. Jobs, and so a call's chunks, keep their order.

    A job that is quickly done, with none before it, is done on the event loop.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._num_at_work = 0  # jobs of the thread whose listeners were not told

    def submit(self, news: News) -> None:
        """Makes what the calls' listeners want of their chunks, and tells them, or of the error that ends a call."""
        loop = asyncio.get_running_loop()
        if not self._num_at_work and _is_quick(news):
            loop.call_soon(_deliver, _make(news))
            return
        self._num_at_work += 1
        self._thread.submit(self._work, news, loop)

    def _work(self, news: News, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon_threadsafe(self._tell, _make(news))

    def _tell(self, made: Sequence[tuple[Call[Any], TokenChunk | Exception, Any]]) -> None:
        self._num_at_work -= 1
        _deliver(made)

    def close(self) -> None:
        """Drops what is not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _is_quick(news: News) -> bool:
    """Whether the text of it takes less than handing it over."""
    return len(news) <= _FEW_CALLS and all(
        isinstance(chunk, Exception)
        or (len(chunk.token_ids) <= _FEW_TOKENS and chunk.logprobs is None and chunk.prompt_logprobs is None)
        for _, chunk in news
    )


def _make(news: News) -> list[tuple[Call[Any], TokenChunk | Exception, Any]]:
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
    return made


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
