"""A directory without Ray: the plain state, in this process, which can be away and be restarted."""

from __future__ import annotations

import math
import time
from typing import Any

from dflash_ray.rpc.directory import Directory, DirectoryClient


class LocalDirectory(DirectoryClient):
    """What a DirectoryClient offers, with calls that fail while `is_away`."""

    def __init__(self, is_away: bool = False, started_at: float = -math.inf) -> None:
        super().__init__()
        self.is_away = is_away
        self.plain = Directory(started_at)
        self.renewals: list[tuple[str, str, float]] = []  # (target, router, time) of each that succeeded

    def restart(self) -> None:
        """Comes back with nothing of what it knew."""
        self.plain = Directory(started_at=time.monotonic(), first_epoch=time.time_ns())
        self.is_away = False

    async def _call(self, method: str, *args: Any) -> Any:
        if self.is_away:
            raise ConnectionError("the directory is away")
        answer = getattr(self.plain, method)(
            *args, *(() if method in ("unregister", "release") else (time.monotonic(),))
        )
        if method == "renew" and answer:
            self.renewals.append((args[0], args[1], time.monotonic()))
        return answer
