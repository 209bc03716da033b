"""The routers this gateway knows, and calls to the one with the least of its requests."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Container

import grpc

from dflash_ray.config import NetworkConfig
from dflash_ray.core.back_off import BackOff
from dflash_ray.core.errors import DeadlineExceededError, UnavailableError
from dflash_ray.gateway.calls import Call, Listener, Made, TextThread
from dflash_ray.gateway.router_stream import RouterStream
from dflash_ray.pb import router_pb2
from dflash_ray.rpc.channel import open_channel
from dflash_ray.rpc.directory import DirectoryClient, Entry, View
from dflash_ray.rpc.known_entries import KnownEntries, refresh

_POLL_S = 0.5
_FIRST_BACK_OFF_S = 0.1
_MAX_BACK_OFF_S = 2.0


class _Link:
    """A router's channel, and the stream over it, which is opened anew when it has ended."""

    def __init__(self, channel: grpc.aio.Channel, text: TextThread) -> None:
        self._channel = channel
        self._text = text
        self._stream: RouterStream | None = None
        self._back_off = BackOff(_FIRST_BACK_OFF_S, _MAX_BACK_OFF_S)
        self._not_before = 0.0

    @property
    def num_open(self) -> int:
        """Calls that have not ended."""
        return 0 if self._stream is None else self._stream.num_open

    def stream(self) -> RouterStream:
        """The stream that calls go to. Raises UnavailableError where one failed a short while ago."""
        now = time.monotonic()
        ended = self._stream
        if ended is not None and ended.ended_by is None:
            return ended
        if ended is not None and now < self._not_before:
            raise UnavailableError(ended.ended_by or "")
        # Should this one fail as well, the next waits; a router that answers the hello is tried again at once.
        self._not_before = now + self._back_off.next()
        self._stream = RouterStream(self._channel, self._text, self._back_off.reset)
        return self._stream

    async def close(self) -> None:
        """Ends all calls."""
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close()


class Routers:
    """Entries of the directory and one stream to each. While the directory is away the known ones stay."""

    def __init__(self, directory: DirectoryClient, network: NetworkConfig) -> None:
        self._directory = directory
        self._known = KnownEntries(directory, "router", network.entry_ttl_s)
        self._max_message_bytes = network.max_message_bytes
        self._links: dict[str, _Link] = {}
        self._text = TextThread()

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
        for router_id in [i for i, link in self._links.items() if i not in known and not link.num_open]:
            await self._links.pop(router_id).close()

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
            link = self._links.get(entry.id)
            load = (0 if link is None else link.num_open) / max(1, entry.info.get("num_groups", 1))
            # Several gateways that see the same must not all choose the same.
            return _readiness(entry, model_fingerprint), entry.id == failed, load, random.random()

        return min(entries, key=rank)

    def open(
        self,
        router: Entry,
        request: router_pb2.GenerateTokensRequest,
        deadline: float,
        listener: Listener[Made],
    ) -> Call[Made]:
        """Sends a request to a router. Raises DeadlineExceededError, or UnavailableError while the router is away."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceededError("the request's time is over")
        link = self._links.get(router.id)
        if link is None:
            channel = open_channel(router.address, self._max_message_bytes)
            link = self._links[router.id] = _Link(channel, self._text)
        return link.stream().open(request, remaining, listener)

    async def close(self) -> None:
        """Ends all calls."""
        for link in self._links.values():
            await link.close()
        self._text.close()


def _readiness(entry: Entry, model_fingerprint: str) -> int:
    """0: it leads what is wanted. 1: it leads nothing yet. 2: it leads other models only."""
    if not entry.info.get("ready"):
        return 1
    return 0 if model_fingerprint in ("", *entry.info.get("models", ())) else 2
