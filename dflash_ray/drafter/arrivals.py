"""Rows that have come for sessions and that the compute thread has not taken yet, and the requests that wait for them.

Lives on the event loop. A session has a number for its life, by which the columns here and the contexts of the compute
thread know it. Its rows come in order, from its features' stream or with the router's requests; `ends` says how many
have come. The compute thread takes those that a draft needs first, the others when it is idle.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dflash_ray.core.arrays import Ints
from dflash_ray.drafter.rows import Rows
from dflash_ray.drafter.sessions import Key, Reason

NO_SESSION = -1
_NO_FAULT = 0
_ROWS_A_TURN = 128  # that are taken at once while nothing is to be drafted
_MAX_WAITING_BYTES = 16 * 1024 * 1024  # of features; no more are read from their streams meanwhile
_COLUMNS = ("ends", "is_coming", "is_behind", "faults", "_is_wanted")


class _Wait(NamedTuple):
    """A request that waits until `sessions` have `wanted` rows."""

    sessions: Ints
    wanted: Ints
    over: asyncio.Event


class Arrivals:
    """Rows on their way to all sessions of a replica.

    Attributes:
        ends: [N] rows that have come, taken or not.
        is_coming: [N] a features' stream brings more.
        is_behind: [N] a request has waited for rows in vain; none waits again until they have caught up.
        faults: [N] why the session was lost, 0 if it was not.
    """

    def __init__(self) -> None:
        self.ends = np.zeros(64, dtype=np.int64)
        self.is_coming = np.zeros(64, dtype=np.bool_)
        self.is_behind = np.zeros(64, dtype=np.bool_)
        self.faults = np.zeros(64, dtype=np.int64)
        self._is_wanted = np.zeros(64, dtype=np.bool_)  # all false but within `take`
        self._session_of: dict[Key, int] = {}
        self._free: list[int] = list(range(64))
        self._waiting: list[Rows] = []  # rows that are not taken yet
        self._waits: list[_Wait] = []
        self._num_bytes = 0
        self._has_rows = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    def session(self, key: Key) -> int:
        """The session's number, NO_SESSION where there is none."""
        return self._session_of.get(key, NO_SESSION)

    def sessions(self, stream: int, sequence_ids: Iterable[int]) -> Ints:
        """The numbers of a router's sequences."""
        get = self._session_of.get
        return np.array([get((stream, sequence_id), NO_SESSION) for sequence_id in sequence_ids], dtype=np.int64)

    def open(self, key: Key) -> int:
        """The session's number, a fresh one where there is none; one that was lost starts again."""
        session = self._session_of.get(key)
        if session is None:
            if not self._free:
                self._grow()
            session = self._session_of[key] = heapq.heappop(self._free)
        elif not self.faults[session]:
            return session
        self.ends[session], self.faults[session] = 0, _NO_FAULT
        self.is_coming[session] = self.is_behind[session] = False
        return session

    def close(self, keys: Iterable[Key]) -> list[int]:
        """Forgets sessions and their rows. Nobody gets their numbers, which it returns, before `release`."""
        closed = [session for key in keys if (session := self._session_of.pop(key, None)) is not None]
        self._end(closed, _NO_FAULT)
        return closed

    def release(self, sessions: Iterable[int]) -> None:
        """The compute thread has forgotten closed sessions as well."""
        for session in sessions:
            heapq.heappush(self._free, session)

    def lose(self, sessions: Sequence[int], reasons: Sequence[Reason]) -> None:
        """Sessions are lost, with all their rows."""
        self._end(sessions, reasons)

    def _end(self, sessions: Sequence[int], faults: int | Sequence[Reason]) -> None:
        if sessions:
            ended = np.array(sessions)
            self.take(ended)
            self.ends[ended], self.faults[ended] = 0, faults
            self.stop(sessions)

    def stop(self, sessions: Sequence[int]) -> None:
        """Nothing comes any more."""
        if sessions:
            self.is_coming[sessions] = False
            self._tell()

    def of_stream(self, stream: int) -> list[Key]:
        """Sessions that a router's stream opened."""
        return [key for key in self._session_of if key[0] == stream]

    def put(self, rows: Rows) -> int | None:
        """Takes rows of open sessions. Returns the first place whose rows don't follow those that came; None if all do.

        Rows that have come before are ignored, and all rows of a session that is lost.
        """
        if len(set(rows.sessions.tolist())) < len(rows.sessions):
            places = np.arange(len(rows.sessions))
            return next((int(at) for at in places if self.put(rows.only(places == at)) is not None), None)
        seen = self.ends[rows.sessions] - rows.starts
        is_lost = self.faults[rows.sessions] != _NO_FAULT
        gaps = ((seen < 0) & ~is_lost).nonzero()[0]
        if seen.any() or is_lost.any() or not rows.counts.all():
            rows = rows.after(np.maximum(seen, 0)).only(~is_lost & (seen >= 0) & (rows.counts > seen))
        if len(rows.sessions):
            self.ends[rows.sessions] += rows.counts
            self._waiting.append(rows)
            self._num_bytes += rows.num_bytes
            if self._num_bytes >= _MAX_WAITING_BYTES:
                self._has_room.clear()
            self._tell()  # first: who waits for rows takes them before the idle thread does
            self._has_rows.set()
        return int(gaps[0]) if len(gaps) else None

    async def wait(self, sessions: Ints, wanted: Ints, timeout_s: float) -> None:
        """Returns when these sessions have `wanted` rows, or get no more, or after `timeout_s`."""
        wait = _Wait(sessions, wanted, asyncio.Event())
        self._waits.append(wait)
        try:
            self._tell()
            async with asyncio.timeout(timeout_s):
                await wait.over.wait()
        except TimeoutError:
            return
        finally:
            self._waits.remove(wait)

    def _tell(self) -> None:
        for wait in self._waits:
            if not (self.is_coming[wait.sessions] & (self.ends[wait.sessions] < wait.wanted)).any():
                wait.over.set()

    def take(self, sessions: Ints) -> list[Rows]:
        """The rows of these sessions that are not taken yet, for the compute thread."""
        if not self._waiting:
            return []
        self._is_wanted[sessions] = True
        taken, left = [], []
        for rows in self._waiting:
            is_wanted = self._is_wanted[rows.sessions]
            if is_wanted.all():
                taken.append(rows)
            elif is_wanted.any():
                taken.append(rows.only(is_wanted))
                left.append(rows.only(~is_wanted))
            else:
                left.append(rows)
        self._is_wanted[sessions] = False
        self._waiting = left
        self._took(taken)
        return taken

    def _took(self, taken: list[Rows]) -> None:
        self._num_bytes -= sum(rows.num_bytes for rows in taken)
        if self._num_bytes < _MAX_WAITING_BYTES:
            self._has_room.set()
        if not self._waiting:
            self._has_rows.clear()

    async def next_turn(self) -> list[Rows]:
        """Rows for the compute thread, whosever have waited longest."""
        await self._has_rows.wait()
        turn: list[Rows] = []
        room = _ROWS_A_TURN
        while self._waiting and room:
            rows = self._waiting.pop(0)
            if rows.num_rows > room:
                rows, rest = rows.split(room)
                self._waiting.insert(0, rest)
            turn.append(rows)
            room -= rows.num_rows
        self._took(turn)
        return turn

    async def room(self) -> None:
        """Returns when more features may be read."""
        await self._has_room.wait()

    def _grow(self) -> None:
        count = len(self.ends)
        for name in _COLUMNS:
            setattr(self, name, np.pad(getattr(self, name), (0, count)))
        self._free = list(range(count, 2 * count))
