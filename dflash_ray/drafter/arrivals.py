"""Rows that have come for sessions and that the compute thread has not taken yet, and the requests that wait for them.

Lives on the event loop. A session's rows come in order, from its features' stream or with the router's requests; `end`
says how many have come. The compute thread takes those that a draft needs first, the others when it is idle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dflash_ray.drafter.sessions import Key, Reason, Rows

_ROWS_A_TURN = 128  # that are taken at once while nothing is to be drafted
_MAX_WAITING_BYTES = 16 * 1024 * 1024  # of features; no more are read from their streams meanwhile


class Wait:
    """A request that waits for rows of sessions."""

    def __init__(self) -> None:
        self._lacking: set[Key] = set()
        self._over = asyncio.Event()

    def add(self, key: Key) -> None:
        self._lacking.add(key)

    def discard(self, key: Key) -> None:
        """The session has its rows, or gets none any more."""
        self._lacking.discard(key)
        if not self._lacking:
            self._over.set()

    async def over(self, timeout_s: float) -> None:
        """Returns when nothing is lacking any more, or after `timeout_s`."""
        if self._lacking:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._over.wait()
            except TimeoutError:
                return


@dataclass(slots=True, eq=False)
class Arrival:
    """One session's rows on their way.

    Attributes:
        end: rows that have come, taken or not.
        is_coming: a features' stream brings more.
        is_behind: a request has waited for rows in vain; none waits again until they have caught up.
        fault: why the session was lost, if it was.
        features, token_ids: rows that are not taken yet, the last `num_waiting` before `end`.
        wait, wanted: the request that waits until `end` reaches `wanted`.
    """

    key: Key
    end: int = 0
    is_coming: bool = False
    is_behind: bool = False
    fault: Reason | None = None
    features: list[Tensor] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_waiting: int = 0
    wait: Wait | None = None
    wanted: int = 0

    def stop(self) -> None:
        """Nothing comes any more."""
        self.is_coming = False
        self._tell()

    def wait_for(self, wanted: int, wait: Wait) -> None:
        self.wait, self.wanted = wait, wanted
        wait.add(self.key)

    def came(self) -> None:
        """Rows have come."""
        if self.end >= self.wanted:
            self._tell()

    def _tell(self) -> None:
        if self.wait is not None:
            self.wait.discard(self.key)
            self.wait = None


class Arrivals:
    """Of all sessions of a replica."""

    def __init__(self) -> None:
        self._by_key: dict[Key, Arrival] = {}
        self._waiting: dict[Arrival, None] = {}  # with rows that are not taken yet
        self._num_bytes = 0
        self._has_rows = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    def get(self, key: Key) -> Arrival | None:
        return self._by_key.get(key)

    def open(self, key: Key) -> Arrival:
        """The session's, a fresh one where there is none or it was lost."""
        found = self._by_key.get(key)
        if found is None or found.fault is not None:
            found = self._by_key[key] = Arrival(key)
        return found

    def close(self, key: Key) -> Arrival | None:
        """Forgets a session and its rows."""
        found = self._by_key.pop(key, None)
        if found is not None:
            self._pop(found)
            found.stop()
        return found

    def lose(self, arrival: Arrival, reason: Reason) -> None:
        """The session is lost, with all its rows."""
        self._pop(arrival)
        arrival.fault, arrival.end = reason, 0
        arrival.stop()

    def of_stream(self, stream: int) -> list[Key]:
        """Sessions that a router's stream opened."""
        return [key for key in self._by_key if key[0] == stream]

    def put(self, arrival: Arrival, start: int, features: Tensor | None, token_ids: Sequence[int] = ()) -> bool:
        """Takes rows of positions start, start + 1, ...; false when rows before them are missing.

        Rows that have come before are ignored, and all rows of a session that is closed or lost.
        """
        if arrival.fault is not None or self._by_key.get(arrival.key) is not arrival:
            return True
        rows = token_ids if features is None else features
        seen = arrival.end - start
        if seen < 0:
            return False
        count = len(rows) - seen
        if count <= 0:
            return True
        if features is None:
            arrival.token_ids.extend(token_ids[seen:])
        else:
            arrival.features.append(features[seen:] if seen else features)
            self._num_bytes += arrival.features[-1].nbytes
            if self._num_bytes >= _MAX_WAITING_BYTES:
                self._has_room.clear()
        arrival.num_waiting += count
        arrival.end += count
        arrival.came()
        self._waiting.setdefault(arrival)
        self._has_rows.set()
        return True

    def take(self, arrivals: Iterable[Arrival]) -> list[Rows]:
        """The rows of these sessions that are not taken yet, for the compute thread."""
        return [rows for arrival in arrivals if (rows := self._pop(arrival)) is not None]

    async def next_turn(self) -> list[Rows]:
        """Rows for the compute thread, whosever have waited longest."""
        await self._has_rows.wait()
        turn: list[Rows] = []
        room = _ROWS_A_TURN
        while self._waiting and room > 0:
            arrival = next(iter(self._waiting))
            room -= arrival.num_waiting
            turn += self.take([arrival])
        if not self._waiting:
            self._has_rows.clear()
        return turn

    async def room(self) -> None:
        """Returns when more features may be read."""
        await self._has_room.wait()

    def _pop(self, arrival: Arrival) -> Rows | None:
        if arrival not in self._waiting:
            return None
        del self._waiting[arrival]
        rows = Rows(arrival.key, arrival.end - arrival.num_waiting, arrival.features, arrival.token_ids)
        self._num_bytes -= sum(part.nbytes for part in arrival.features)
        if self._num_bytes < _MAX_WAITING_BYTES:
            self._has_room.set()
        arrival.features, arrival.token_ids, arrival.num_waiting = [], [], 0
        return rows
