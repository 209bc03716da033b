"""What this router knows of the cluster: target groups it leases, drafters it is connected to.

A directory that is away changes nothing: leases are renewed when it is back, and streams that stand go on.
"""

from __future__ import annotations

import asyncio
import logging

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.errors import UnavailableError
from dflash_ray.observability.metrics import RouterMetrics
from dflash_ray.router.pipeline import Pipeline
from dflash_ray.rpc.directory import DirectoryClient, Entry

logger = logging.getLogger(__name__)
_FIRST_TARGET_WAIT_S = 5.0


class Fleet:
    """Pipelines of this router, one for each target group that it leads or has lost and hopes to see again."""

    def __init__(
        self, config: DflashRayConfig, router_id: str, directory: DirectoryClient, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._router_id = router_id
        self._directory = directory
        self._metrics = metrics
        self.pipelines: list[Pipeline] = []

    @property
    def is_ready(self) -> bool:
        """Whether at least one target group answers."""
        return any(pipeline.target_id is not None for pipeline in self.pipelines)

    async def pick(self) -> Pipeline:
        """The least loaded pipeline, those with a target first. Raises UnavailableError when there is none for long."""
        for _ in range(int(_FIRST_TARGET_WAIT_S / 0.1)):
            if self.pipelines:
                return min(self.pipelines, key=lambda pipeline: (pipeline.target_id is None, pipeline.load))
            await asyncio.sleep(0.1)
        raise UnavailableError("no target group is up; try again later")

    async def run(self) -> None:
        """Polls the directory until cancelled."""
        period_s = min(self._config.router.lease_ttl_s, self._config.network.entry_ttl_s) / 5
        while True:
            try:
                await self._refresh_targets()
                await self._refresh_drafters()
            except ConnectionError as error:
                logger.warning("going on with the known targets and drafters: %s", error)
            await asyncio.sleep(period_s if self.is_ready else 0.2)

    async def _refresh_targets(self) -> None:
        for entry in await self._directory.entries("target"):
            pipeline = next((p for p in self.pipelines if p.target_id == entry.id), None)
            epoch = await self._directory.lease(entry.id, self._router_id, self._config.router.lease_ttl_s)
            if pipeline is None and epoch is not None:
                await self._lead(entry, epoch)
            elif pipeline is not None and epoch is None:
                logger.warning("another router took the lease", extra={"target_id": entry.id})
                await pipeline.disconnect_target()

    async def _lead(self, entry: Entry, epoch: int) -> None:
        """Connects a new group to a pipeline that has lost its own, or to a new one."""
        orphan = next((p for p in self.pipelines if p.target_id is None), None)
        pipeline = orphan or Pipeline(self._config, self._router_id, self._metrics)
        try:
            await pipeline.connect_target(entry, epoch)
        except ConnectionError as error:
            logger.warning("target group %s cannot be led: %s", entry.id, error)
            # The epoch may have been used up by a stream that broke: the next lease brings a higher one.
            await self._directory.release(entry.id, self._router_id)
            return
        if orphan is None:
            self.pipelines.append(pipeline)

    async def _refresh_drafters(self) -> None:
        for entry in await self._directory.entries("drafter"):
            for pipeline in self.pipelines:
                if pipeline.target_id is None or pipeline.knows_drafter(entry.id):
                    continue
                try:
                    await pipeline.connect_drafter(entry)
                except ConnectionError as error:
                    logger.warning("drafter %s does not answer: %s", entry.id, error)

    def update_metrics(self) -> None:
        """Gauges and counters over all pipelines."""
        model = self._config.model.served_name
        schedulers = [pipeline.scheduler for pipeline in self.pipelines]
        pages = sum(s.limits.num_pages for s in schedulers if s.limits is not None)
        free = sum(s.free_pages for s in schedulers if s.limits is not None)
        self._metrics.num_running.labels(model).set(sum(s.num_running for s in schedulers))
        self._metrics.num_waiting.labels(model).set(sum(s.num_waiting for s in schedulers))
        self._metrics.kv_cache_usage.labels(model).set(1 - free / pages if pages else 0.0)
        for pipeline in self.pipelines:
            pipeline.update_metrics()

    async def close(self) -> None:
        for pipeline in self.pipelines:
            await pipeline.close()
