"""Attempts to connect: each runs by itself, so that whoever does not answer delays nobody else."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Container, Hashable
from dataclasses import dataclass, field

from dflash_ray.core.back_off import BackOff

logger = logging.getLogger(__name__)
_FIRST_BACK_OFF_S = 0.5
_MAX_BACK_OFF_S = 10.0


class FinalError(ConnectionError):
    """Trying again would give the same answer."""


@dataclass(slots=True)
class _Attempt:
    task: asyncio.Task[None] | None = None
    back_off: BackOff = field(default_factory=lambda: BackOff(_FIRST_BACK_OFF_S, _MAX_BACK_OFF_S))
    not_before: float = 0.0


class Attempts:
    """One attempt at a time for each key, less and less often while they fail."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, _Attempt] = {}

    def is_running(self, key: Hashable) -> bool:
        attempt = self._by_key.get(key)
        return attempt is not None and attempt.task is not None and not attempt.task.done()

    def start(self, key: Hashable, connect: Callable[[], Awaitable[None]]) -> None:
        """Runs `connect` in a task, unless it runs or failed a short while ago; a FinalError ends the attempts."""
        attempt = self._by_key.setdefault(key, _Attempt())
        if not self.is_running(key) and asyncio.get_running_loop().time() >= attempt.not_before:
            attempt.task = asyncio.create_task(_run(attempt, connect))

    def keep(self, keys: Container[Hashable]) -> None:
        """Forgets all others; those that run are cancelled."""
        for key in [key for key in self._by_key if key not in keys]:
            attempt = self._by_key.pop(key)
            if attempt.task is not None:
                attempt.task.cancel()

    async def close(self) -> None:
        """Cancels all, and returns when they have ended."""
        tasks = [attempt.task for attempt in self._by_key.values() if attempt.task is not None]
        self.keep(())
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(attempt: _Attempt, connect: Callable[[], Awaitable[None]]) -> None:
    try:
        await connect()
    except FinalError as error:
        logger.warning("%s", error)
        attempt.not_before = math.inf
    except Exception as error:  # whatever it is, it concerns this one only
        is_expected = isinstance(error, ConnectionError)
        pause_s = attempt.back_off.next()
        logger.warning("trying again in %g s: %s", pause_s, error, exc_info=not is_expected)
        attempt.not_before = asyncio.get_running_loop().time() + pause_s
    else:
        attempt.back_off.reset()
