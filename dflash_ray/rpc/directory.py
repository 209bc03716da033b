"""Who is where, and which router leads which target group.

`Directory` is the plain state: entries that expire, and leases with fencing epochs. `DirectoryActor` hosts it in the
cluster; `DirectoryClient` is what processes use, and `KnownEntries` what they remember. A directory that is away
changes nothing for those who already know each other. One that is restarted is filled again by the next heartbeats:
until all had time for one, it takes the leases that their holders show, grants none anew, and nobody is forgotten for
being absent from it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

Kind = Literal["target", "drafter", "router", "gateway"]
ACTOR_NAME = "dflash_ray_directory"
NAMESPACE = "dflash_ray"
_CHECK_S = 0.1  # how soon a changed entry is registered
_RETRY_S = 0.5

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


@dataclass(frozen=True, slots=True)
class View:
    """What the directory knows of one kind.

    Attributes:
        entries: live ones, oldest first.
        age_s: for how long the directory has been up; who has not renewed since is not in it yet.
    """

    entries: list[Entry]
    age_s: float


@dataclass(slots=True)
class _Lease:
    router_id: str
    epoch: int
    expires_at: float


class Directory:
    """Entries and leases; the caller passes the time in seconds, from any one monotonic clock.

    Args:
        started_at: leases that others granted before may still be held a TTL later.
    """

    def __init__(self, started_at: float = -math.inf, first_epoch: int = 1) -> None:
        self._started_at = started_at
        self._entries: dict[tuple[Kind, str], tuple[Entry, float]] = {}
        self._leases: dict[str, _Lease] = {}
        self._next_epoch = first_epoch

    def woke(self, now: float) -> None:
        """The directory itself was held up: as after a start, it cannot know who would have renewed meanwhile."""
        self._started_at = now

    def register(self, entry: Entry, ttl_s: float, now: float) -> None:
        """Adds or renews an entry."""
        self._entries[entry.kind, entry.id] = (entry, now + ttl_s)

    def unregister(self, kind: Kind, entry_id: str) -> None:
        """Removes an entry and, with a target's, its lease; unknown ones are ignored."""
        self._entries.pop((kind, entry_id), None)
        if kind == "target":
            self._leases.pop(entry_id, None)

    def view(self, kind: Kind, now: float) -> View:
        """Live entries of a kind."""
        self._forget_expired(now)
        return View([entry for entry, _ in self._entries.values() if entry.kind == kind], now - self._started_at)

    def _forget_expired(self, now: float) -> None:
        self._entries = {key: item for key, item in self._entries.items() if item[1] > now}
        # The lease of a target that is only silent stays as long as its holder renews it.
        self._leases = {
            target_id: lease
            for target_id, lease in self._leases.items()
            if lease.expires_at > now or ("target", target_id) in self._entries
        }

    def lease(self, target_id: str, router_id: str, ttl_s: float, now: float) -> int | None:
        """Takes the lease of a target group.

        Returns the fencing epoch, higher than any before for a new holder, or None while another router holds the lease
        or may still come to renew one that was granted before this directory started.
        """
        lease = self._leases.get(target_id)
        if lease is None or lease.expires_at <= now:
            if now < self._started_at + ttl_s:
                return None
            lease = _Lease(router_id, self._next_epoch, now)
            self._next_epoch += 1
            self._leases[target_id] = lease
        elif lease.router_id != router_id:
            return None
        lease.expires_at = now + ttl_s
        return lease.epoch

    def renew(self, target_id: str, router_id: str, epoch: int, ttl_s: float, now: float) -> bool:
        """Renews the lease that was granted under `epoch`, by this directory or by one before it.

        Returns False when another router was granted the group since.
        """
        lease = self._leases.get(target_id)
        if lease is not None and (lease.epoch > epoch or (lease.epoch == epoch and lease.router_id != router_id)):
            return False
        self._leases[target_id] = _Lease(router_id, epoch, now + ttl_s)
        self._next_epoch = max(self._next_epoch, epoch + 1)
        return True

    def release(self, target_id: str, router_id: str) -> None:
        """Gives a lease back early; a lease held by another router stays."""
        lease = self._leases.get(target_id)
        if lease is not None and lease.router_id == router_id:
            del self._leases[target_id]


class DirectoryActor:
    """The directory as a Ray actor. Epochs start at the wall clock, so they rise over restarts as well."""

    def __init__(self) -> None:
        self._asked_at = time.monotonic()
        self._lease_ttl_s = math.inf
        self._directory = Directory(self._asked_at, first_epoch=time.time_ns())

    def _now(self) -> float:
        """The time of a call. Gateways and routers ask twice a second: a long silence is this process's own."""
        now = time.monotonic()
        if now - self._asked_at > self._lease_ttl_s / 2:
            self._directory.woke(now)
        self._asked_at = now
        return now

    def register(self, entry: Entry, ttl_s: float) -> None:
        self._directory.register(entry, ttl_s, self._now())

    def unregister(self, kind: Kind, entry_id: str) -> None:
        self._directory.unregister(kind, entry_id)

    def view(self, kind: Kind) -> View:
        return self._directory.view(kind, self._now())

    def lease(self, target_id: str, router_id: str, ttl_s: float) -> int | None:
        return self._directory.lease(target_id, router_id, ttl_s, self._now())

    def renew(self, target_id: str, router_id: str, epoch: int, ttl_s: float) -> bool:
        self._lease_ttl_s = ttl_s
        return self._directory.renew(target_id, router_id, epoch, ttl_s, self._now())

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

    async def view(self, kind: Kind) -> View:
        view: View = await self._call("view", kind)
        return view

    async def entries(self, kind: Kind) -> list[Entry]:
        return (await self.view(kind)).entries

    async def lease(self, target_id: str, router_id: str, ttl_s: float) -> int | None:
        epoch: int | None = await self._call("lease", target_id, router_id, ttl_s)
        return epoch

    async def renew(self, target_id: str, router_id: str, epoch: int, ttl_s: float) -> bool:
        is_held: bool = await self._call("renew", target_id, router_id, epoch, ttl_s)
        return is_held

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


class KnownEntries:
    """The processes of one kind as a reader remembers them.

    None is forgotten because the directory is away, or because it has just started and not heard of everyone yet. A
    reader has to ask once in a TTL for that: what it remembers from before says nothing of who is there now.
    """

    def __init__(self, directory: DirectoryClient, kind: Kind, ttl_s: float) -> None:
        self._directory = directory
        self._kind = kind
        self._ttl_s = ttl_s
        self._by_id: dict[str, Entry] = {}
        self._asked_at = -math.inf
        self._is_away = False

    @property
    def entries(self) -> list[Entry]:
        """As of the last refresh."""
        return list(self._by_id.values())

    async def refresh(self) -> list[Entry]:
        """Asks the directory, and returns what is known then."""
        now = time.monotonic()
        is_old, self._asked_at = now - self._asked_at > self._ttl_s, now
        try:
            view = await self._directory.view(self._kind)
        except ConnectionError as error:
            if not self._is_away:
                logger.warning("going on with the %ss that are known: %s", self._kind, error)
            self._is_away = True
            return self.entries
        self._is_away = False
        if is_old:
            self._by_id = {}
        self.update(view)
        return self.entries

    def update(self, view: View) -> None:
        """Takes what the directory told."""
        told = {entry.id: entry for entry in view.entries}
        self._by_id = told if view.age_s >= self._ttl_s else self._by_id | told


def start_directory(timeout_s: float = 60.0) -> None:
    """Returns when the directory answers, so that processes started next find it at once.

    Raises:
        TimeoutError: it does not answer in time (ray.exceptions.GetTimeoutError).
    """
    ray.get(_get_or_create_actor().view.remote("router"), timeout=timeout_s)


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


async def keep_registered(client: DirectoryClient, current: Callable[[], Entry], ttl_s: float) -> None:
    """Renews an entry three times a TTL, and at once when it changes, until cancelled."""
    loop = asyncio.get_running_loop()
    told: Entry | None = None
    renew_at = 0.0
    while True:
        pause_s = min(_CHECK_S, ttl_s / 10)
        entry = current()
        if entry != told or loop.time() >= renew_at:
            try:
                await client.register(entry, ttl_s)
                told, renew_at = entry, loop.time() + ttl_s / 3
            except ConnectionError as error:
                logger.warning("registration of %s %s is late: %s", entry.kind, entry.id, error)
                pause_s = min(_RETRY_S, ttl_s / 10)
        await asyncio.sleep(pause_s)
