"""The gateway's Serve replica: HTTP through Serve's proxy, gRPC on a server of its own."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from ray import serve

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.garbage import leave_out_what_stands
from dflash_ray.observability.logs import configure_logging
from dflash_ray.pb import generation_pb2, generation_pb2_grpc
from dflash_ray.rpc.channel import RunningServer, format_address, new_server, start_server
from dflash_ray.rpc.directory import DirectoryClient, Entry, keep_registered, leave
from dflash_ray.rpc.malformed import RefuseMalformed
from dflash_ray.rpc.metrics import SERVICE_NAME as METRICS_SERVICE_NAME
from dflash_ray.rpc.metrics import add_metrics_service
from dflash_ray.rpc.node import bind_host
from dflash_ray.rpc.serve_port import bind_serve_port

logger = logging.getLogger(__name__)
_SERVICE_NAME = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name
_POLL_S = 0.25


def _http_app() -> FastAPI:
    from dflash_ray.gateway.http_api import build_http_app

    return build_http_app(lambda: serve.get_replica_context().servable_object.parts)  # type: ignore[attr-defined]


@serve.ingress(_http_app)
class GatewayReplica:
    """One gateway process. Serve awaits the constructor.

    Args:
        peers: handles of the other deployments, bound so that Serve deploys them; requests do not use them.
    """

    async def __init__(self, config: DflashRayConfig, *peers: Any) -> None:  # type: ignore[misc]
        self._closing = AsyncExitStack()
        configure_logging("gateway", config.observability.log_level, config.observability.log_format)
        bind_serve_port()
        # Whoever deploys this class imports it, and has no use for tokenizers and templates.
        from dflash_ray.gateway.parts import GatewayParts

        self._directory = DirectoryClient()
        self.parts = GatewayParts(config, self._directory)
        self._closing.push_async_callback(self.parts.close)
        self._tasks: list[asyncio.Task[None]] = []
        self._closing.callback(self._cancel_tasks)
        self._server = await self._serve()
        # Answers go on meanwhile, also when their router is stopped and another one takes them.
        self._closing.push_async_callback(self._server.stop, grace_s=config.gateway.drain_timeout_s)
        entry = await self._serve_metrics()
        registration = keep_registered(self._directory, entry, config.network.entry_ttl_s)
        loops = (registration, self.parts.routers.run(), self.parts.metrics_page.run(), self._report_health())
        self._tasks += [asyncio.create_task(loop) for loop in loops]
        self._closing.push_async_callback(self._unregister)
        leave_out_what_stands()

    async def _serve(self) -> RunningServer:
        """The clients' server. Gateways of one node share its port: the system spreads connections over them."""
        from dflash_ray.gateway.grpc_api import GenerationServicer

        config = self.parts.config.gateway
        server = new_server(
            config.max_body_bytes, [RefuseMalformed()], max_connection_age_s=config.grpc_connection_age_s
        )
        generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(self.parts), server)
        return await start_server(server, [_SERVICE_NAME], bind_host(config.grpc_host), config.grpc_port)

    async def _serve_metrics(self) -> Entry:
        """An inner server, on which the other gateways ask for this one's metrics."""
        server = new_server(self.parts.config.network.max_message_bytes)
        add_metrics_service(server, self.parts.metrics.render)
        host = bind_host(self.parts.config.network.bind_host)
        inner = await start_server(server, [METRICS_SERVICE_NAME], host, 0)
        self._closing.push_async_callback(inner.stop)
        info = {"pid": os.getpid(), "grpc_port": self._server.port}
        return Entry("gateway", self.parts.gateway_id, format_address(host, inner.port), info)

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _report_health(self) -> None:
        """Keeps the standard gRPC health in step with GET /health."""
        while True:
            await self._server.set_serving(self.parts.routers.has_ready)
            await asyncio.sleep(_POLL_S)

    async def check_health(self) -> None:
        """Raises when one of the gateway's loops has ended."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def _unregister(self) -> None:
        self._tasks[0].cancel()  # or the entry would come back
        await leave(self._directory, "gateway", self.parts.gateway_id)

    async def __del__(self) -> None:
        await self._closing.aclose()
