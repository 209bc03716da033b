"""What a process remembers of the directory's entries."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

from dflash_ray.rpc.directory import NOTHING_SEEN, DirectoryClient, Entry, Kind, View

logger = logging.getLogger(__name__)
_PATIENCE = 0.4  # of a TTL


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
        self._version = NOTHING_SEEN
        self._asked_at = -math.inf
        self._is_away = False

    @property
    def entries(self) -> list[Entry]:
        """As of the last refresh."""
        return list(self._by_id.values())

    async def refresh(self) -> list[Entry]:
        """Asks the directory, and returns what is known then."""
        await refresh(self._directory, [self])
        return self.entries

    def update(self, view: View) -> None:
        """Takes what the directory told."""
        self._version = view.version
        told = {entry.id: entry for entry in view.entries}
        self._by_id = told if view.age_s >= self._ttl_s else self._by_id | told


async def refresh(directory: DirectoryClient, known: Sequence[KnownEntries], is_patient: bool = False) -> None:
    """Brings several kinds up to date with one call.

    Args:
        is_patient: returns when something has changed, or after a good part of a TTL.
    """
    now = time.monotonic()
    is_old = [now - each._asked_at > each._ttl_s for each in known]
    wait_s = _PATIENCE * min(each._ttl_s for each in known) if is_patient and not any(is_old) else 0.0
    for each in known:
        each._asked_at = now + wait_s
    try:
        views = await directory.watch({each._kind: each._version for each in known}, wait_s)
    except ConnectionError as error:
        for each in known:
            if not each._is_away:
                logger.warning("going on with the %ss that are known: %s", each._kind, error)
            each._is_away = True
        return
    for each, forgets in zip(known, is_old, strict=True):
        each._is_away = False
        if forgets:
            each._by_id = {}
        each.update(views[each._kind])
