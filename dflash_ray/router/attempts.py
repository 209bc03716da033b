"""Attempts to connect: each runs by itself, so that whoever does not answer delays nobody else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

logger = logging.getLogger(__name__)
_FIRST_BACK_OFF_S = 0.5
_MAX_BACK_OFF_S = 10.0


class FinalError(ConnectionError):
    """Trying again would give the same answer."""


@dataclass(slots=True)
class _Attempt:
    task: asyncio.Task[None]
    back_off_s: float = _FIRST_BACK_OFF_S
    not_before: float = 0.0


class Attempts:
    """One attempt at a time for each key, less and less often while they fail."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, _Attempt] = {}

    def is_running(self, key: Hashable) -> bool:
        attempt = self._by_key.get(key)
        return attempt is not None and not attempt.task.done()

    def start(self, key: Hashable, connect: Callable[[], Awaitable[None]]) -> None:
        """Runs `connect` in a task, unless it runs or failed a short while ago; a FinalError ends the attempts."""
        before = self._by_key.get(key)
        if self.is_running(key) or (before is not None and asyncio.get_running_loop().time() < before.not_before):
            return
        back_off_s = before.back_off_s if before is not None else _FIRST_BACK_OFF_S
        self._by_key[key] = _Attempt(asyncio.create_task(self._run(key, connect)), back_off_s)

    async def _run(self, key: Hashable, connect: Callable[[], Awaitable[None]]) -> None:
        try:
            await connect()
        except FinalError as error:
            logger.warning("%s", error)
            self._by_key[key].not_before = float("inf")
        except Exception as error:  # whatever it is, it concerns this one only
            attempt = self._by_key[key]
            is_expected = isinstance(error, ConnectionError)
            logger.warning("trying again in %g s: %s", attempt.back_off_s, error, exc_info=not is_expected)
            attempt.not_before = asyncio.get_running_loop().time() + attempt.back_off_s
            attempt.back_off_s = min(_MAX_BACK_OFF_S, 2 * attempt.back_off_s)
        else:
            self._by_key[key].back_off_s = _FIRST_BACK_OFF_S

    def keep(self, keys: set[Hashable]) -> None:
        """Forgets all others; those that run are cancelled."""
        for key in self._by_key.keys() - keys:
            self._by_key.pop(key).task.cancel()

    async def close(self) -> None:
        """Cancels all, and returns when they have ended."""
        tasks = [attempt.task for attempt in self._by_key.values()]
        self._by_key.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
