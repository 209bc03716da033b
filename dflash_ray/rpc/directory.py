"""Who is where, and which router leads which target group.

`Directory` is the plain state: entries that expire, and leases with fencing epochs. `DirectoryActor` hosts it in the
cluster; `DirectoryClient` is what processes use, and `KnownEntries` (known_entries.py) what they remember. A directory
that is away changes nothing for those who already know each other. One that is restarted is filled again by the next
heartbeats: until all had time for one, it takes the leases that their holders show, grants none anew, and nobody is
forgotten for being absent from it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import ray

Kind = Literal["target", "drafter", "router", "gateway"]
ACTOR_NAME = "dflash_ray_directory"
NAMESPACE = "dflash_ray"
_CHECK_S = 0.25  # how soon a changed entry is registered
_RETRY_S = 0.5
NOTHING_SEEN = -1  # no version of anything

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
        version: another one for other entries, also from another directory.
    """

    entries: list[Entry]
    age_s: float
    version: int = 0


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
        self._versions: dict[Kind, int] = dict.fromkeys(get_args(Kind), first_epoch)

    def woke(self, now: float) -> None:
        """The directory itself was held up: as after a start, it cannot know who would have renewed meanwhile."""
        self._started_at = now

    def register(self, entry: Entry, ttl_s: float, now: float) -> None:
        """Adds or renews an entry."""
        known = self._entries.get((entry.kind, entry.id))
        self._versions[entry.kind] += known is None or known[0] != entry
        self._entries[entry.kind, entry.id] = (entry, now + ttl_s)

    def unregister(self, kind: Kind, entry_id: str) -> None:
        """Removes an entry and, with a target's, its lease; unknown ones are ignored."""
        self._versions[kind] += self._entries.pop((kind, entry_id), None) is not None
        if kind == "target":
            self._leases.pop(entry_id, None)

    def view(self, kind: Kind, now: float) -> View:
        """Live entries of a kind."""
        self._forget_expired(now)
        entries = [entry for entry, _ in self._entries.values() if entry.kind == kind]
        return View(entries, now - self._started_at, self._versions[kind])

    def next_expiry(self) -> float:
        """When the first of all entries expires unless it is renewed."""
        return min((expires_at for _, expires_at in self._entries.values()), default=math.inf)

    def _forget_expired(self, now: float) -> None:
        for (kind, entry_id), (_, expires_at) in list(self._entries.items()):
            if expires_at <= now:
                del self._entries[kind, entry_id]
                self._versions[kind] += 1
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
        self._watchers: set[asyncio.Event] = set()

    def _now(self) -> float:
        """The time of a call. Whoever is there renews in shorter periods: a long silence is this process's own."""
        now = time.monotonic()
        if now - self._asked_at > self._lease_ttl_s / 2:
            self._directory.woke(now)
        self._asked_at = now
        return now

    def register(self, entry: Entry, ttl_s: float) -> None:
        self._directory.register(entry, ttl_s, self._now())
        self._wake_watchers()

    def unregister(self, kind: Kind, entry_id: str) -> None:
        self._directory.unregister(kind, entry_id)
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        for changed in self._watchers:
            changed.set()

    async def watch(self, seen: dict[Kind, int], wait_s: float) -> dict[Kind, View]:
        """Views of these kinds, as soon as one has another version than was seen, after `wait_s` at the latest."""
        give_up_at = time.monotonic() + wait_s
        self._watchers.add(changed := asyncio.Event())
        try:
            while True:
                changed.clear()
                now = self._now()
                views = {kind: self._directory.view(kind, now) for kind in seen}
                if now >= give_up_at or any(view.version != seen[kind] for kind, view in views.items()):
                    return views
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(give_up_at, self._directory.next_expiry()) - now):
                        await changed.wait()
        finally:
            self._watchers.discard(changed)

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

    async def watch(self, seen: dict[Kind, int], wait_s: float = 0.0) -> dict[Kind, View]:
        """As DirectoryActor.watch."""
        views: dict[Kind, View] = await self._call("watch", seen, wait_s, timeout_s=wait_s + self._call_timeout_s)
        return views

    async def entries(self, kind: Kind) -> list[Entry]:
        return (await self.watch({kind: NOTHING_SEEN}))[kind].entries

    async def lease(self, target_id: str, router_id: str, ttl_s: float) -> int | None:
        epoch: int | None = await self._call("lease", target_id, router_id, ttl_s)
        return epoch

    async def renew(self, target_id: str, router_id: str, epoch: int, ttl_s: float) -> bool:
        is_held: bool = await self._call("renew", target_id, router_id, epoch, ttl_s)
        return is_held

    async def release(self, target_id: str, router_id: str) -> None:
        await self._call("release", target_id, router_id)

    async def _call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(_get_or_create_actor)
            timeout_s = self._call_timeout_s if timeout_s is None else timeout_s
            return await asyncio.wait_for(getattr(self._actor, method).remote(*args), timeout_s)
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
    ray.get(_get_or_create_actor().watch.remote({}, 0.0), timeout=timeout_s)


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


async def keep_registered(client: DirectoryClient, current: Entry | Callable[[], Entry], ttl_s: float) -> None:
    """Renews an entry three times a TTL, and at once when it changes, until cancelled.

    Args:
        current: the entry, or what gives it where it changes.
    """
    loop = asyncio.get_running_loop()
    told: Entry | None = None
    renew_at = 0.0
    while True:
        pause_s = ttl_s / 3 if isinstance(current, Entry) else min(_CHECK_S, ttl_s / 10)
        entry = current if isinstance(current, Entry) else current()
        if entry != told or loop.time() >= renew_at:
            try:
                await client.register(entry, ttl_s)
                told, renew_at = entry, loop.time() + ttl_s / 3
            except ConnectionError as error:
                logger.warning("registration of %s %s is late: %s", entry.kind, entry.id, error)
                pause_s = min(_RETRY_S, ttl_s / 10)
        await asyncio.sleep(pause_s)
