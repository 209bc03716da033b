"""Cores that everything on a machine shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Job:
    left: float  # seconds, by itself
    width: float
    then: Callable[[], None]


class Cores:
    """Work that takes so many seconds by itself, and longer where all work together wants more cores than there are.

    Then all of it is slowed alike, as by a fair scheduler of threads.

    Args:
        count: of cores; 0: everything has its own.
        clock: seconds.
        at: has a callback called at a time.
    """

    def __init__(
        self, count: float, clock: Callable[[], float], at: Callable[[float, Callable[[], None]], None]
    ) -> None:
        self._count, self._clock, self._at = count, clock, at
        self._jobs: list[_Job] = []
        self._since = 0.0
        self._round = 0  # the job that was thought to end first is looked at no more once another one came or went

    def run(self, seconds: float, width: float, then: Callable[[], None]) -> None:
        """Begins work that keeps `width` cores busy, and calls `then` at its end."""
        if not self._count or not width:
            self._at(self._clock() + seconds, then)
            return
        self._advance()
        self._jobs.append(_Job(seconds, width, then))
        self._expect()

    @property
    def _speed(self) -> float:
        return min(1.0, self._count / sum(job.width for job in self._jobs))

    def _advance(self) -> None:
        now = self._clock()
        if self._jobs:
            done = (now - self._since) * self._speed
            for job in self._jobs:
                job.left -= done
        self._since = now

    def _expect(self) -> None:
        self._round += 1
        if self._jobs:
            first, expected = min(self._jobs, key=lambda job: job.left), self._round
            self._at(self._clock() + max(0.0, first.left) / self._speed, lambda: self._end(first, expected))

    def _end(self, job: _Job, expected: int) -> None:
        if expected != self._round:
            return
        self._advance()
        self._jobs.remove(job)
        self._expect()
        job.then()
