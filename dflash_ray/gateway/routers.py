"""The routers this gateway knows, and calls to the one with the least of its requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator

import grpc

from dflash_ray.core.errors import DeadlineExceededError, UnavailableError
from dflash_ray.pb import router_pb2, router_pb2_grpc
from dflash_ray.rpc.channel import open_channel
from dflash_ray.rpc.directory import DirectoryClient, Entry

logger = logging.getLogger(__name__)
_POLL_S = 0.5


class Routers:
    """Entries of the directory and one channel to each. While the directory is away the known ones stay."""

    def __init__(self, directory: DirectoryClient, max_message_bytes: int) -> None:
        self._directory = directory
        self._max_message_bytes = max_message_bytes
        self._entries: dict[str, Entry] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._outstanding: Counter[str] = Counter()

    @property
    def has_ready(self) -> bool:
        """Whether a router says that it leads a target group."""
        return any(entry.info.get("ready") for entry in self._entries.values())

    async def run(self) -> None:
        """Polls the directory until cancelled."""
        while True:
            try:
                self.update(await self._directory.entries("router"))
            except ConnectionError as error:
                logger.warning("going on with the known routers: %s", error)
            await asyncio.sleep(_POLL_S)

    def update(self, entries: list[Entry]) -> None:
        """Takes the directory's view."""
        self._entries = {entry.id: entry for entry in entries}

    async def generate(
        self, request: router_pb2.GenerateTokensRequest, deadline: float
    ) -> AsyncGenerator[router_pb2.TokenChunk, None]:
        """Chunks from the least loaded ready router. Raises UnavailableError, DeadlineExceededError or the call's."""
        entry = self._pick()
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceededError("the request's time is over")
        self._outstanding[entry.id] += 1
        call = router_pb2_grpc.RouterStub(self._channel(entry)).Generate(request, timeout=remaining)
        try:
            async for chunk in call:
                yield chunk
        finally:
            call.cancel()
            self._outstanding[entry.id] -= 1

    def _pick(self) -> Entry:
        entries = list(self._entries.values())
        if not entries:
            raise UnavailableError("no router is up; try again later")
        return min(entries, key=lambda entry: (not entry.info.get("ready"), self._outstanding[entry.id]))

    def _channel(self, entry: Entry) -> grpc.aio.Channel:
        if entry.id not in self._channels:
            self._channels[entry.id] = open_channel(entry.address, self._max_message_bytes)
        return self._channels[entry.id]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
