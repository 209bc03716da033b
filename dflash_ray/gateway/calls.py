"""Calls at routers, and the thread that makes text of what comes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from dflash_ray.gateway.token_chunks import TokenChunk

Made = TypeVar("Made")


class Call(Generic[Made]):
    """One request at one router, as whoever waits for its tokens sees it.

    What has come and was not fetched yet is bounded by the request's max_new_tokens.

    Args:
        make: what whoever waits wants of each chunk; called on the text thread, chunk after chunk.
        cancel: called with the id when nobody waits any more.
    """

    def __init__(self, call_id: int, make: Callable[[TokenChunk], Made], cancel: Callable[[int], None]) -> None:
        self.id = call_id
        self.make = make
        self._cancel = cancel
        self._news: asyncio.Queue[tuple[TokenChunk, Made] | Exception] = asyncio.Queue()

    async def next(self) -> tuple[TokenChunk, Made]:
        """The next chunk and what was made of it. Raises RequestError when the call ends with one."""
        news = await self._news.get()
        if isinstance(news, Exception):
            raise news
        return news

    def close(self) -> None:
        """Frees the sequence, unless the call has ended."""
        self._cancel(self.id)

    def put(self, news: tuple[TokenChunk, Made] | Exception) -> None:
        """Gives whoever waits the next thing."""
        self._news.put_nowait(news)


class TextThread:
    """One job for each message of a router, with all calls in it. Jobs, and so a call's chunks, keep their order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text")

    def submit(self, news: Sequence[tuple[Call[Made], TokenChunk | Exception]]) -> None:
        """Makes what the calls want of their chunks, and gives it, or the error that ends a call, to them."""
        self._thread.submit(_make, news, asyncio.get_running_loop())

    def close(self) -> None:
        """Drops what is not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _make(news: Sequence[tuple[Call[Made], TokenChunk | Exception]], loop: asyncio.AbstractEventLoop) -> None:
    made: list[tuple[Call[Made], tuple[TokenChunk, Made] | Exception]] = []
    for call, chunk in news:
        if isinstance(chunk, Exception):
            made.append((call, chunk))
            continue
        try:
            made.append((call, (chunk, call.make(chunk))))
        except Exception as fault:  # its neighbours are not concerned
            made.append((call, fault))
    loop.call_soon_threadsafe(_deliver, made)


def _deliver(made: Sequence[tuple[Call[Made], tuple[TokenChunk, Made] | Exception]]) -> None:
    for call, news in made:
        call.put(news)
