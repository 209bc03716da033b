"""Who is where, and which router leads which target group.

`Directory` is the plain state: entries that expire, and leases with fencing epochs. `DirectoryActor` hosts it in the
cluster; `DirectoryClient` is what processes use. A directory that is away changes nothing for those who already know
each other, and a restarted one is filled again by the next heartbeats.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

Kind = Literal["target", "drafter", "router"]
ACTOR_NAME = "dflash_ray_directory"
NAMESPACE = "dflash_ray"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A process that can be reached.

    Attributes:
        id: unique over restarts, so that a new process at an old address is a new entry.
        address: host:port of its gRPC server.
        info: what others need before they connect (pid, node, fingerprints), plain JSON values.
    """

    kind: Kind
    id: str
    address: str
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Lease:
    router_id: str
    epoch: int
    expires_at: float


class Directory:
    """Entries and leases; the caller passes the time in seconds, from any one monotonic clock."""

    def __init__(self, first_epoch: int = 1) -> None:
        self._entries: dict[tuple[Kind, str], tuple[Entry, float]] = {}
        self._leases: dict[str, _Lease] = {}
        self._next_epoch = first_epoch

    def register(self, entry: Entry, ttl_s: float, now: float) -> None:
        """Adds or renews an entry."""
        self._entries[entry.kind, entry.id] = (entry, now + ttl_s)

    def unregister(self, kind: Kind, entry_id: str) -> None:
        """Removes an entry; unknown ones are ignored."""
        self._entries.pop((kind, entry_id), None)
        if kind == "target":
            self._leases.pop(entry_id, None)

    def entries(self, kind: Kind, now: float) -> list[Entry]:
        """Live entries of a kind, oldest first."""
        for key, (_, expires_at) in list(self._entries.items()):
            if expires_at <= now:
                self.unregister(*key)
        return [entry for entry, _ in self._entries.values() if entry.kind == kind]

    def lease(self, target_id: str, router_id: str, ttl_s: float, now: float) -> int | None:
        """Takes or renews the lease of a target group.

        Returns the fencing epoch, the same for every renewal and higher than any before for a new holder, or None
        while another router holds the lease.
        """
        lease = self._leases.get(target_id)
        if lease is not None and lease.expires_at > now and lease.router_id != router_id:
            return None
        if lease is None or lease.expires_at <= now or lease.router_id != router_id:
            lease = _Lease(router_id, self._next_epoch, now)
            self._next_epoch += 1
            self._leases[target_id] = lease
        lease.expires_at = now + ttl_s
        return lease.epoch

    def release(self, target_id: str, router_id: str) -> None:
        """Gives a lease back early; a lease held by another router stays."""
        lease = self._leases.get(target_id)
        if lease is not None and lease.router_id == router_id:
            del self._leases[target_id]


class DirectoryActor:
    """The directory as a Ray actor. Epochs start at the wall clock, so they rise over restarts as well."""

    def __init__(self) -> None:
        self._directory = Directory(first_epoch=time.time_ns())

    def register(self, entry: Entry, ttl_s: float) -> None:
        self._directory.register(entry, ttl_s, time.monotonic())

    def unregister(self, kind: Kind, entry_id: str) -> None:
        self._directory.unregister(kind, entry_id)

    def entries(self, kind: Kind) -> list[Entry]:
        return self._directory.entries(kind, time.monotonic())

    def lease(self, target_id: str, router_id: str, ttl_s: float) -> int | None:
        return self._directory.lease(target_id, router_id, ttl_s, time.monotonic())

    def release(self, target_id: str, router_id: str) -> None:
        self._directory.release(target_id, router_id)


class DirectoryClient:
    """Calls the directory actor and creates it when there is none. Calls raise ConnectionError while it is away."""

    def __init__(self, call_timeout_s: float = 2.0) -> None:
        self._call_timeout_s = call_timeout_s
        self._actor: Any = None

    async def register(self, entry: Entry, ttl_s: float) -> None:
        await self._call("register", entry, ttl_s)

    async def unregister(self, kind: Kind, entry_id: str) -> None:
        await self._call("unregister", kind, entry_id)

    async def entries(self, kind: Kind) -> list[Entry]:
        entries: list[Entry] = await self._call("entries", kind)
        return entries

    async def lease(self, target_id: str, router_id: str, ttl_s: float) -> int | None:
        epoch: int | None = await self._call("lease", target_id, router_id, ttl_s)
        return epoch

    async def release(self, target_id: str, router_id: str) -> None:
        await self._call("release", target_id, router_id)

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(_get_or_create_actor)
            return await asyncio.wait_for(getattr(self._actor, method).remote(*args), self._call_timeout_s)
        except (ray.exceptions.RayError, TimeoutError, ValueError) as error:
            self._actor = None
            raise ConnectionError(f"the directory did not answer {method}: {error!r}") from error


def _get_or_create_actor() -> Any:
    actor_class = ray.remote(DirectoryActor)
    return actor_class.options(
        name=ACTOR_NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
    ).remote()


def start_directory(timeout_s: float = 60.0) -> None:
    """Returns when the directory answers, so that processes started next find it at once.

    Raises:
        TimeoutError: it does not answer in time (ray.exceptions.GetTimeoutError).
    """
    ray.get(_get_or_create_actor().entries.remote("router"), timeout=timeout_s)


def stop_directory() -> None:
    """Ends the directory actor, which outlives whoever created it; it holds nothing that outlives the application."""
    try:
        ray.kill(ray.get_actor(ACTOR_NAME, namespace=NAMESPACE))
    except ValueError:
        return


async def leave(client: DirectoryClient, kind: Kind, entry_id: str) -> None:
    """Removes an entry; one that cannot be reached is left to expire."""
    try:
        await client.unregister(kind, entry_id)
    except ConnectionError as error:
        logger.warning("the directory entry is left to expire: %s", error)


async def keep_registered(client: DirectoryClient, entry: Entry, ttl_s: float) -> None:
    """Renews an entry three times a TTL until cancelled."""
    while True:
        try:
            await client.register(entry, ttl_s)
        except ConnectionError as error:
            logger.warning("registration of %s %s is late: %s", entry.kind, entry.id, error)
        await asyncio.sleep(ttl_s / 3)
