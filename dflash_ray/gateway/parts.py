"""The gateway's parts, as both of its APIs use them."""

from __future__ import annotations

import asyncio
import contextvars
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dflash_ray.config import DflashRayConfig
from dflash_ray.gateway.bodies import UnknownFields
from dflash_ray.gateway.generation import Generator
from dflash_ray.gateway.requests import RequestBuilder
from dflash_ray.gateway.routers import Routers
from dflash_ray.gateway.traffic import TrafficRecorder
from dflash_ray.observability.metrics import GatewayMetrics
from dflash_ray.rpc.directory import DirectoryClient
from dflash_ray.rpc.metrics import MetricsPage
from dflash_ray.text.tokenizer import ChatTokenizer

Result = TypeVar("Result")
_NUM_THREADS = 8  # a few large bodies at a time leave room for small ones


class GatewayParts:
    """Everything between the APIs and the routers."""

    def __init__(self, config: DflashRayConfig, directory: DirectoryClient) -> None:
        self.gateway_id = uuid.uuid4().hex[:12]
        self.config = config
        self.started_at = int(time.time())
        self.metrics = GatewayMetrics()
        self.tokenizer = ChatTokenizer(config.model)
        self.traffic = None if config.gateway.traffic is None else TrafficRecorder(config.gateway.traffic)
        self.requests = RequestBuilder(config, self.tokenizer, self.traffic)
        self.unknown_fields = UnknownFields()
        self.routers = Routers(directory, config.network)
        self.metrics_page = MetricsPage(directory, config.network, ("gateway", self.gateway_id), self.metrics.render)
        self.generator = Generator(
            self.routers,
            self.tokenizer,
            self.metrics,
            config.model.served_name,
            config.gateway.request_timeout_s,
            config.router.target_wait_s,
        )
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="requests")

    async def in_thread(self, work: Callable[..., Result], *args: object) -> Result:
        """Runs what takes long for a large request - reading, templates, tokenizing - beside the event loop."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, work, *args)

    async def close(self) -> None:
        """Ends the connections to routers, and writes what is still to be recorded."""
        await self.routers.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.traffic is not None:
            self.traffic.close()

    async def render_metrics(self) -> str:
        """Metrics of every process of the application."""
        return await self.metrics_page.collect()
