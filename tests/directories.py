"""A directory without Ray: the plain state, in this process, which can be away and be restarted."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from dflash_ray.rpc.directory import Directory, DirectoryClient, Kind, View


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

    async def _call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        if self.is_away:
            raise ConnectionError("the directory is away")
        if method == "watch":
            return await self._watch(*args)
        answer = getattr(self.plain, method)(
            *args, *(() if method in ("unregister", "release") else (time.monotonic(),))
        )
        if method == "renew" and answer:
            self.renewals.append((args[0], args[1], time.monotonic()))
        return answer

    async def _watch(self, seen: dict[Kind, int], wait_s: float) -> dict[Kind, View]:
        give_up_at = time.monotonic() + wait_s
        while not self.is_away:
            views = {kind: self.plain.view(kind, time.monotonic()) for kind in seen}
            if time.monotonic() >= give_up_at or any(view.version != seen[kind] for kind, view in views.items()):
                return views
            await asyncio.sleep(0.01)
        raise ConnectionError("the directory is away")
