"""The target's Serve replica: keeps one group of ranks alive and its directory entry true.

The replica holds no weights. When a rank dies the whole group is started again in the same placement group; after
several failed starts the replica reports itself unhealthy and Serve replaces it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from contextlib import ExitStack
from typing import Any

from dflash_ray.config import DflashRayConfig
from dflash_ray.observability.logs import configure_logging
from dflash_ray.rpc.directory import DirectoryClient, Entry, keep_registered, leave
from dflash_ray.rpc.serve_port import bind_serve_port
from dflash_ray.target_group.group import GroupStartError, TargetGroup

logger = logging.getLogger(__name__)
_MAX_FAILED_STARTS = 3


class TargetReplica:
    """Supervises one target group. Serve awaits the constructor, so a replica that runs has a group that answers."""

    async def __init__(self, config: DflashRayConfig) -> None:
        self._closing = ExitStack()
        configure_logging("target", config.observability.log_level, config.observability.log_format)
        bind_serve_port()
        self._config = config
        self._directory = DirectoryClient()
        self._failure: str | None = None
        self._target_id = ""
        self._group = await self._start_group()
        self._closing.callback(lambda: self._group.kill())  # the group of that time: it is replaced when a rank dies
        self._supervision = asyncio.create_task(self._supervise())
        self._closing.callback(self._supervision.cancel)

    async def _start_group(self) -> TargetGroup:
        threads = self._config.target.num_threads or max(1, (os.cpu_count() or 1) // self._config.target.tp_size)
        # The rest is the replica's own, which its actors inherit.
        env = {} if os.environ.get("OMP_NUM_THREADS") == str(threads) else {"OMP_NUM_THREADS": str(threads)}
        self._target_id = uuid.uuid4().hex[:12]
        return await TargetGroup.start(self._config, self._target_id, env)

    async def _supervise(self) -> None:
        while True:
            entry = Entry("target", self._target_id, self._group.info["address"], self._group.info)
            registration = asyncio.create_task(
                keep_registered(self._directory, entry, self._config.network.entry_ttl_s)
            )
            reason = await self._group.wait_for_death()
            logger.error("a target rank died; the group is started again", extra={"reason": reason})
            registration.cancel()
            await leave(self._directory, "target", entry.id)
            await self._restart()

    async def _restart(self) -> None:
        for attempt in range(_MAX_FAILED_STARTS):
            try:
                self._group = await self._start_group()
                return
            except GroupStartError as error:
                failure = str(error)
                logger.exception("target group start failed", extra={"attempt": attempt})
                await asyncio.sleep(2.0**attempt)
        self._failure = failure
        await asyncio.Event().wait()  # check_health reports the failure, and Serve replaces the replica

    async def check_health(self) -> None:
        """Raises when the group could not be started again."""
        if self._supervision.done():
            self._supervision.result()
        if self._failure is not None:
            raise RuntimeError(self._failure)

    async def __del__(self) -> None:
        self._closing.close()


def target_placement(config: DflashRayConfig) -> tuple[list[dict[str, float]], str, dict[str, Any]]:
    """Bundles, strategy and actor options of a replica: one bundle a rank, the replica itself in the first."""
    placement = config.target.placement
    bundle: dict[str, float] = {"CPU": placement.num_cpus, **placement.resources}
    if config.target.num_gpus:
        bundle["GPU"] = config.target.num_gpus
    bundles = [dict(bundle) for _ in range(config.target.tp_size)]
    return bundles, config.target.placement_strategy, {"num_cpus": min(0.1, placement.num_cpus)}
