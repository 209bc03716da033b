"""What this router knows of the cluster: target groups that it leases, drafters it is connected to, other routers.

A directory that is away changes nothing: leases are renewed when it is back, and streams that stand go on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.errors import DeadlineExceededError, OtherModelError, OverloadedError, UnavailableError
from dflash_ray.observability.metrics import RouterMetrics
from dflash_ray.router.attempts import Attempts
from dflash_ray.router.leases import Leases
from dflash_ray.router.pipeline import Pipeline
from dflash_ray.rpc.directory import DirectoryClient, Entry
from dflash_ray.rpc.known_entries import KnownEntries, refresh

logger = logging.getLogger(__name__)
_POLL_S = 0.5
_FIRST_POLL_S = 0.2  # while no group is led
_LEASE_RENEWALS = 5  # a TTL


class Fleet:
    """Pipelines of this router, one for each target group that it leads, or has lost with requests that wait for it."""

    def __init__(
        self, config: DflashRayConfig, router_id: str, directory: DirectoryClient, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._router_id = router_id
        self._metrics = metrics
        entry_ttl_s = config.network.entry_ttl_s
        self._directory = directory
        self._targets = KnownEntries(directory, "target", entry_ttl_s)
        self._drafters = KnownEntries(directory, "drafter", entry_ttl_s)
        self._routers = KnownEntries(directory, "router", entry_ttl_s)
        self._leases = Leases(directory, router_id, config.router.lease_ttl_s)
        self._attempts = Attempts()
        self._num_taking = 0
        self._deferred_since: dict[str, float] = {}
        self._connecting: set[Pipeline] = set()
        self._num_unplaced = 0
        self.pipelines: list[Pipeline] = []

    @property
    def led(self) -> list[Pipeline]:
        """Pipelines whose target group answers."""
        return [pipeline for pipeline in self.pipelines if pipeline.target_id is not None]

    @property
    def is_ready(self) -> bool:
        """Whether at least one target group answers."""
        return bool(self.led)

    def info(self) -> dict[str, Any]:
        """What gateways and other routers are told of this one."""
        led = self.led
        models = sorted({pipeline.model_fingerprint for pipeline in led})
        return {"ready": bool(led), "num_groups": len(self._leases.target_ids), "models": models}

    def _is_led_elsewhere(self, model_fingerprint: str = "") -> bool:
        return any(
            entry.id != self._router_id
            and entry.info.get("ready")
            and model_fingerprint in ("", *entry.info.get("models", ()))
            for entry in self._routers.entries
        )

    async def pick(self, model_fingerprint: str = "") -> Pipeline:
        """The least loaded group, of that model when one is named. Waits only while no router leads any.

        Raises:
            OtherModelError: groups are led here, but none of that model.
            UnavailableError: another router leads a group.
            OverloadedError: too many wait already.
            DeadlineExceededError: no group came within target_wait_s.
        """
        router = self._config.router
        give_up_at = time.monotonic() + router.target_wait_s
        if not self.led and self._num_unplaced >= router.max_waiting + router.max_running:
            raise OverloadedError(f"{self._num_unplaced} requests wait for a target group; try again later")
        self._num_unplaced += 1
        try:
            while True:
                led = self.led
                fitting = [pipeline for pipeline in led if model_fingerprint in ("", pipeline.model_fingerprint)]
                if fitting:
                    return min(fitting, key=lambda pipeline: pipeline.load)
                if led:
                    raise OtherModelError("no target group here serves the model that began this answer")
                if self._is_led_elsewhere(model_fingerprint):
                    raise UnavailableError("this router leads no target group, another one does")
                if time.monotonic() >= give_up_at:
                    raise DeadlineExceededError(f"no target group came within {router.target_wait_s:g} s")
                await asyncio.sleep(_FIRST_POLL_S)
        finally:
            self._num_unplaced -= 1

    async def run(self) -> None:
        """Leads groups and joins drafters until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_leases())
            tasks.create_task(self._follow_directory())
            tasks.create_task(self._keep_connections())

    async def _keep_leases(self) -> None:
        """Nothing else is awaited here, so that no slow peer lets a lease run out."""
        while True:
            for target_id in await self._leases.renew():
                logger.warning("another router took the lease", extra={"target_id": target_id})
                for pipeline in self.led:
                    if pipeline.target_id == target_id:
                        pipeline.hand_over("another router leads the target group")
                        pipeline.disconnect_target()
            await asyncio.sleep(self._config.router.lease_ttl_s / _LEASE_RENEWALS)

    async def _follow_directory(self) -> None:
        while True:
            await refresh(self._directory, (self._targets, self._drafters, self._routers), is_patient=True)
            await asyncio.sleep(_FIRST_POLL_S)

    async def _keep_connections(self) -> None:
        longest_s = min(_POLL_S, self._config.network.entry_ttl_s / 5)
        while True:
            await self._leave_lost_groups()
            self._connect()
            await asyncio.sleep(longest_s if self.is_ready else _FIRST_POLL_S)

    async def _leave_lost_groups(self) -> None:
        """Gives back leases that nothing here uses, and requests that can go on elsewhere."""
        led = {pipeline.target_id for pipeline in self.led}
        for target_id in self._leases.target_ids:
            if target_id not in led and not self._attempts.is_running(("target", target_id)):
                # The epoch was used up by the stream that broke; the next lease brings a higher one.
                await self._leases.give_back(target_id)
        for pipeline in [p for p in self.pipelines if p.target_id is None]:
            if pipeline.load and (led or self._is_led_elsewhere()):
                pipeline.hand_over("the target group was lost, and another one is led")
            if not pipeline.load and pipeline not in self._connecting:
                pipeline.update_metrics()
                self.pipelines.remove(pipeline)
                await pipeline.close()

    def _connect(self) -> None:
        """Starts whatever connection is missing, and ends attempts for what is gone."""
        led = {pipeline.target_id for pipeline in self.led}
        targets = {("target", entry.id): entry for entry in self._targets.entries if entry.id not in led}
        drafters = {
            (pipeline, pipeline.target_id, entry.id): entry
            for pipeline in self.led
            for entry in self._drafters.entries
            if not pipeline.knows_drafter(entry.id)
        }
        self._attempts.keep({*targets, *drafters})
        for target, entry in targets.items():
            self._attempts.start(target, partial(self._lead, entry))
        for drafter, entry in drafters.items():
            self._attempts.start(drafter, partial(drafter[0].connect_drafter, entry))
        deferred = self._deferred_since.keys() & {entry.id for entry in targets.values()}
        self._deferred_since = {target_id: self._deferred_since[target_id] for target_id in deferred}

    async def _lead(self, entry: Entry) -> None:
        """Takes a group's lease if it is free, and connects it to a pipeline that lost its own or to a new one."""
        if self._defers(entry.id):
            return
        self._num_taking += 1
        try:
            epoch = await self._leases.take(entry.id)
        finally:
            self._num_taking -= 1
        self._deferred_since.pop(entry.id, None)
        if epoch is None:
            return
        orphans = [p for p in self.pipelines if p.target_id is None and p not in self._connecting]
        pipeline = max(orphans, key=lambda p: p.load, default=None) or Pipeline(
            self._config, self._router_id, self._metrics
        )
        self._connecting.add(pipeline)
        try:
            await pipeline.connect_target(entry, epoch)
        except BaseException:
            await self._leases.give_back(entry.id)
            raise
        finally:
            self._connecting.discard(pipeline)
        if pipeline not in self.pipelines:
            self.pipelines.append(pipeline)
        if not self._leases.holds(entry.id, epoch):
            pipeline.disconnect_target()

    def _defers(self, target_id: str) -> bool:
        """Whether a router with fewer groups is to have this one: it is left free for a lease TTL."""
        others = [e.info.get("num_groups", 0) for e in self._routers.entries if e.id != self._router_id]
        if not others or len(self._leases.target_ids) + self._num_taking <= min(others):
            return False
        now = time.monotonic()
        return now - self._deferred_since.setdefault(target_id, now) < self._config.router.lease_ttl_s

    def update_metrics(self) -> None:
        """Gauges and counters over all pipelines."""
        model = self._config.model.served_name
        schedulers = [pipeline.scheduler for pipeline in self.pipelines]
        pages = sum(s.limits.num_pages for s in schedulers if s.limits is not None)
        free = sum(s.free_pages for s in schedulers if s.limits is not None)
        self._metrics.num_running.labels(model).set(sum(s.num_running for s in schedulers))
        self._metrics.num_waiting.labels(model).set(sum(s.num_waiting for s in schedulers) + self._num_unplaced)
        self._metrics.kv_cache_usage.labels(model).set(1 - free / pages if pages else 0.0)
        for pipeline in self.pipelines:
            pipeline.update_metrics()

    async def close(self) -> None:
        """Ends all streams; requests that are left, and the groups, go to other routers at once."""
        await self._attempts.close()
        pipelines, self.pipelines = self.pipelines, []
        for pipeline in pipelines:
            pipeline.hand_over("this router is being stopped")
            pipeline.disconnect_target()
            await pipeline.close()
        await asyncio.gather(*(self._leases.give_back(target_id) for target_id in self._leases.target_ids))
