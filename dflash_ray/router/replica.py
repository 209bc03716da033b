"""The router's Serve replica: serves the Router gRPC service and keeps its directory entry."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from contextlib import AsyncExitStack

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.garbage import leave_out_what_stands
from dflash_ray.observability.logs import configure_logging
from dflash_ray.observability.metrics import RouterMetrics
from dflash_ray.pb import router_pb2, router_pb2_grpc
from dflash_ray.router.fleet import Fleet
from dflash_ray.router.servicer import RouterServicer
from dflash_ray.rpc.channel import RunningServer, format_address, new_server, start_server
from dflash_ray.rpc.directory import DirectoryClient, Entry, keep_registered, leave
from dflash_ray.rpc.metrics import SERVICE_NAME as METRICS_SERVICE_NAME
from dflash_ray.rpc.metrics import add_metrics_service
from dflash_ray.rpc.node import bind_host
from dflash_ray.rpc.serve_port import bind_serve_port

logger = logging.getLogger(__name__)
_POLL_S = 0.25
_SERVICE_NAME = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name


class RouterReplica:
    """One router process. Serve awaits the constructor."""

    async def __init__(self, config: DflashRayConfig) -> None:  # type: ignore[misc]
        self._closing = AsyncExitStack()
        configure_logging("router", config.observability.log_level, config.observability.log_format)
        bind_serve_port()
        self._config = config
        self._router_id = uuid.uuid4().hex[:12]
        self._directory = DirectoryClient()
        self._metrics = RouterMetrics()
        self._fleet = Fleet(config, self._router_id, self._directory, self._metrics)
        self._servicer = RouterServicer(self._fleet)
        host = bind_host(config.network.bind_host)
        self._server = await self._serve(host)
        self._closing.push_async_callback(self._server.stop, grace_s=1.0)
        self._closing.callback(self._servicer.close)
        self._closing.push_async_callback(self._fleet.close)
        self._address = format_address(host, self._server.port)
        registration = keep_registered(self._directory, self._entry, config.network.entry_ttl_s)
        self._tasks = [asyncio.create_task(loop) for loop in (self._fleet.run(), registration, self._report_health())]
        self._closing.push_async_callback(self._unregister)
        leave_out_what_stands()

    async def _serve(self, host: str) -> RunningServer:
        server = new_server(self._config.network.max_message_bytes)
        router_pb2_grpc.add_RouterServicer_to_server(self._servicer, server)
        add_metrics_service(server, self._render_metrics)
        return await start_server(server, [_SERVICE_NAME, METRICS_SERVICE_NAME], host, 0)

    def _render_metrics(self) -> str:
        self._fleet.update_metrics()
        return self._metrics.render()

    def _entry(self) -> Entry:
        return Entry("router", self._router_id, self._address, {"pid": os.getpid(), **self._fleet.info()})

    async def _report_health(self) -> None:
        """Keeps the standard gRPC health in step with whether a target group answers."""
        while True:
            await self._server.set_serving(self._fleet.is_ready)
            await asyncio.sleep(_POLL_S)

    async def check_health(self) -> None:
        """Raises when one of the router's loops has ended, or a pipeline cannot go on."""
        for task in self._tasks:
            if task.done():
                task.result()
        for pipeline in self._fleet.pipelines:
            pipeline.check_health()

    async def _unregister(self) -> None:
        for task in self._tasks:
            task.cancel()
        await leave(self._directory, "router", self._router_id)

    async def __del__(self) -> None:
        await self._closing.aclose()
