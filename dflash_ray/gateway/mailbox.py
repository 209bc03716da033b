"""What comes for one client, from several calls, in the order that it comes."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """For one reader, which takes all that is there.

    Args:
        silence_s: the reader gets an empty list whenever nothing has come for so long while it waited.
    """

    def __init__(self, silence_s: float | None = None) -> None:
        self._silence_s = silence_s
        self._items: list[Item | Exception] = []
        self._reader: asyncio.Future[None] | None = None
        self._waits_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, item: Item | Exception) -> None:
        """An exception is raised to the reader, after what came before it."""
        self._items.append(item)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[Item]:
        """All items that have come, at least one unless there was silence."""
        if not self._items:
            await self._wait()
        items: list[Item] = []
        for at, item in enumerate(self._items):
            if isinstance(item, Exception):
                if not items:
                    raise item
                self._items = self._items[at:]
                return items
            items.append(item)
        self._items = []
        return items

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        self._waits_since = loop.time()
        if self._silence_s is not None and self._timer is None:
            self._timer = loop.call_later(self._silence_s, self._look, self._silence_s)
        try:
            await self._reader
        finally:
            self._reader = None

    def _look(self, silence_s: float) -> None:
        """One timer serves many waits: it looks how long the present one has taken."""
        self._timer = None
        if self._reader is None:
            return
        loop = asyncio.get_running_loop()
        left_s = self._waits_since + silence_s - loop.time()
        if left_s <= 0:
            self._wake()
        else:
            self._timer = loop.call_later(left_s, self._look, silence_s)

    def close(self) -> None:
        """Nobody reads any more."""
        if self._timer is not None:
            self._timer.cancel()
