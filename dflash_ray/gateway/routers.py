"""The routers this gateway knows, and calls to the one with the least of its requests."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Container

import grpc

from dflash_ray.config import NetworkConfig
from dflash_ray.core.errors import DeadlineExceededError, UnavailableError
from dflash_ray.pb import router_pb2, router_pb2_grpc
from dflash_ray.rpc.channel import open_channel
from dflash_ray.rpc.directory import DirectoryClient, Entry, View
from dflash_ray.rpc.known_entries import KnownEntries, refresh

_POLL_S = 0.5


class Routers:
    """Entries of the directory and one channel to each. While the directory is away the known ones stay."""

    def __init__(self, directory: DirectoryClient, network: NetworkConfig) -> None:
        self._directory = directory
        self._known = KnownEntries(directory, "router", network.entry_ttl_s)
        self._max_message_bytes = network.max_message_bytes
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._outstanding: Counter[str] = Counter()

    @property
    def has_ready(self) -> bool:
        """Whether a router says that it leads a target group."""
        return self.has_ready_beside(())

    def has_ready_beside(self, others: Container[str]) -> bool:
        """The same of those whose id is not among `others`."""
        return any(entry.info.get("ready") and entry.id not in others for entry in self._known.entries)

    async def run(self) -> None:
        """Follows the directory until cancelled."""
        while True:
            await self.refresh(is_patient=True)
            await asyncio.sleep(_POLL_S)

    def update(self, entries: list[Entry]) -> None:
        """Knows these and no others, until the next poll."""
        self._known.update(View(entries, age_s=math.inf))

    async def refresh(self, is_patient: bool = False) -> None:
        """Asks the directory, and closes the channels of routers that are gone and have no call left.

        Args:
            is_patient: waits for a change first, for a good part of a TTL.
        """
        await refresh(self._directory, [self._known], is_patient)
        known = {entry.id for entry in self._known.entries}
        for router_id in [i for i in self._channels if i not in known and not self._outstanding[i]]:
            del self._outstanding[router_id]
            await self._channels.pop(router_id).close()

    def pick(self, model_fingerprint: str = "", failed: str | None = None, full: Container[str] = ()) -> Entry:
        """A router that is ready, leads a group of that model when one is named, and has the least of our requests.

        Args:
            failed: taken only when there is no other that is as ready.
            full: ids of those that are not to be taken.

        Raises:
            UnavailableError: there is none.
        """
        entries = [entry for entry in self._known.entries if entry.id not in full]
        if not entries:
            raise UnavailableError("no router is up; try again later")

        def rank(entry: Entry) -> tuple[int, bool, float, float]:
            load = self._outstanding[entry.id] / max(1, entry.info.get("num_groups", 1))
            # Several gateways that see the same must not all choose the same.
            return _readiness(entry, model_fingerprint), entry.id == failed, load, random.random()

        return min(entries, key=rank)

    async def generate(
        self, router: Entry, request: router_pb2.GenerateTokensRequest, deadline: float
    ) -> AsyncGenerator[router_pb2.TokenChunk, None]:
        """Chunks of a call. Raises DeadlineExceededError or the call's AioRpcError; leaving early cancels it."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceededError("the request's time is over")
        self._outstanding[router.id] += 1
        call = router_pb2_grpc.RouterStub(self._channel(router)).Generate(request, timeout=remaining)
        try:
            async for chunk in call:
                yield chunk
        finally:
            call.cancel()
            self._outstanding[router.id] -= 1

    def _channel(self, entry: Entry) -> grpc.aio.Channel:
        if entry.id not in self._channels:
            self._channels[entry.id] = open_channel(entry.address, self._max_message_bytes)
        return self._channels[entry.id]

    async def close(self) -> None:
        """Ends all calls."""
        for channel in self._channels.values():
            await channel.close()


def _readiness(entry: Entry, model_fingerprint: str) -> int:
    """0: it leads what is wanted. 1: it leads nothing yet. 2: it leads other models only."""
    if not entry.info.get("ready"):
        return 1
    return 0 if model_fingerprint in ("", *entry.info.get("models", ())) else 2
