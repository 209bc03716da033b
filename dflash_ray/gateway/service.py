"""The gateway's Serve replica: HTTP through Serve's proxy, gRPC on a server of its own."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from ray import serve

from dflash_ray.config import DflashRayConfig
from dflash_ray.gateway.core import GatewayCore
from dflash_ray.gateway.grpc_api import GenerationServicer
from dflash_ray.gateway.http_api import build_http_app
from dflash_ray.observability.logs import configure_logging
from dflash_ray.pb import generation_pb2, generation_pb2_grpc
from dflash_ray.rpc.channel import new_server, start_server
from dflash_ray.rpc.directory import DirectoryClient
from dflash_ray.rpc.node import bind_host

logger = logging.getLogger(__name__)
_SERVICE_NAME = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name
_POLL_S = 0.2


def _http_app() -> FastAPI:
    return build_http_app(lambda: serve.get_replica_context().servable_object.core)  # type: ignore[attr-defined]


@serve.ingress(_http_app)
class GatewayReplica:
    """One gateway process. Serve awaits the constructor.

    Args:
        peers: handles of the other deployments, bound so that Serve deploys them; requests do not use them.
    """

    async def __init__(self, config: DflashRayConfig, *peers: Any) -> None:  # type: ignore[misc]
        self._closing = AsyncExitStack()
        configure_logging("gateway", config.observability.log_level, config.observability.log_format)
        self.core = GatewayCore(config, DirectoryClient())
        self._closing.push_async_callback(self.core.close)
        self._tasks: list[asyncio.Task[None]] = []
        self._closing.callback(self._cancel_tasks)
        server = new_server(config.gateway.max_body_bytes, max_connection_age_s=config.gateway.grpc_connection_age_s)
        generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(self.core), server)
        host = bind_host(config.gateway.grpc_host)
        self._server = await start_server(server, [_SERVICE_NAME], host, config.gateway.grpc_port)
        # Answers go on meanwhile, also when their router is stopped and another one takes them.
        self._closing.push_async_callback(self._server.stop, grace_s=config.gateway.drain_timeout_s)
        self._tasks += [asyncio.create_task(self.core.routers.run()), asyncio.create_task(self._report_health())]

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _report_health(self) -> None:
        """Keeps the standard gRPC health in step with GET /health."""
        while True:
            await self._server.set_serving(self.core.routers.has_ready)
            await asyncio.sleep(_POLL_S)

    async def check_health(self) -> None:
        """Raises when one of the gateway's loops has ended."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def __del__(self) -> None:
        await self._closing.aclose()
