"""The drafter's Serve replica: loads the method, serves the Drafter gRPC service and keeps its directory entry."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from contextlib import AsyncExitStack

import ray

from dflash_ray.config import DflashRayConfig, NetworkConfig
from dflash_ray.core.memory import keep_freed_memory, return_freed_memory
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.observability.logs import configure_logging
from dflash_ray.observability.metrics import DrafterMetrics
from dflash_ray.pb import drafter_pb2, drafter_pb2_grpc
from dflash_ray.rpc.channel import RunningServer, format_address, new_server, start_server
from dflash_ray.rpc.directory import DirectoryClient, Entry, keep_registered, leave
from dflash_ray.rpc.metrics import SERVICE_NAME as METRICS_SERVICE_NAME
from dflash_ray.rpc.metrics import add_metrics_service
from dflash_ray.rpc.node import bind_host, see_own_gpu
from dflash_ray.rpc.serve_port import bind_serve_port

logger = logging.getLogger(__name__)
_SERVICE_NAME = drafter_pb2.DESCRIPTOR.services_by_name["Drafter"].full_name


class DrafterReplica:
    """One drafter process. Serve awaits the constructor, so a replica that runs is one that answers."""

    async def __init__(self, config: DflashRayConfig) -> None:
        self._closing = AsyncExitStack()
        configure_logging("drafter", config.observability.log_level, config.observability.log_format)
        bind_serve_port()
        if config.drafter.device == "cuda":
            see_own_gpu()
        # Whoever deploys this class imports it, and has no use for torch.
        import torch

        from dflash_ray.drafter.methods import load_method
        from dflash_ray.drafter.servicer import DrafterServicer

        if config.drafter.num_threads:
            torch.set_num_threads(config.drafter.num_threads)
        drafter_id = uuid.uuid4().hex[:12]
        method = await asyncio.to_thread(load_method, config)
        return_freed_memory()
        if method.feature_width:
            keep_freed_memory()
        watchdog = Watchdog(config.drafter.step_timeout_s, "a draft pass")
        self._servicer = DrafterServicer(
            drafter_id,
            method,
            config.drafter_context_tokens,
            config.network.max_message_bytes,
            watchdog,
            DrafterMetrics(),
            config.network.shared_memory,
        )
        self._closing.push_async_callback(self._servicer.close)
        self._server = await self._serve(config.network)
        self._closing.push_async_callback(self._server.stop, grace_s=1.0)
        self._entry = Entry(
            "drafter",
            drafter_id,
            format_address(bind_host(config.network.bind_host), self._server.port),
            {
                "pid": os.getpid(),
                "node_id": ray.get_runtime_context().get_node_id(),
                "method": method.name,
                "fingerprint": method.fingerprint,
            },
        )
        self._directory = DirectoryClient()
        self._registration = asyncio.create_task(
            keep_registered(self._directory, self._entry, config.network.entry_ttl_s)
        )
        self._closing.push_async_callback(self._unregister)
        logger.info("drafter ready", extra={"drafter_id": drafter_id, "address": self._entry.address})

    async def _serve(self, network: NetworkConfig) -> RunningServer:
        server = new_server(network.max_message_bytes)
        drafter_pb2_grpc.add_DrafterServicer_to_server(self._servicer, server)
        add_metrics_service(server, self._servicer.render_metrics)
        return await start_server(server, [_SERVICE_NAME, METRICS_SERVICE_NAME], bind_host(network.bind_host), 0)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The signal of the autoscaling policy."""
        return {"busy_fraction": self._servicer.busy.fraction()}

    async def check_health(self) -> None:
        """Raises when the replica is no longer registered."""
        if self._registration.done():
            self._registration.result()

    async def _unregister(self) -> None:
        self._registration.cancel()
        await leave(self._directory, "drafter", self._entry.id)

    async def __del__(self) -> None:
        await self._closing.aclose()
