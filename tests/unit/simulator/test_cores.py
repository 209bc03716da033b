"""Work that shares cores takes as long as the cores need for all of it."""

import heapq

import pytest

from dflash_ray.simulator.cores import Cores


class Clock:
    def __init__(self, count: float) -> None:
        self.now = 0.0
        self.events = []
        self.ends = {}
        self.cores = Cores(count, lambda: self.now, self.at)

    def at(self, time, event):
        heapq.heappush(self.events, (time, len(self.events) + 1000 * len(self.ends), event))

    def begin(self, name, seconds, width):
        self.cores.run(seconds, width, lambda: self.ends.setdefault(name, self.now))

    def run(self):
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            event()
        return self.ends


def test_a_core_of_its_own_is_as_quick_as_ever():
    clock = Clock(2)
    clock.begin("a", 1.0, 1.0)
    clock.begin("b", 3.0, 1.0)
    assert clock.run() == pytest.approx({"a": 1.0, "b": 3.0})


def test_a_pass_on_all_cores_waits_for_the_work_beside_it():
    clock = Clock(2)
    clock.begin("pass", 10.0, 2.0)
    clock.begin("gateway", 2.0, 1.0)
    assert clock.run() == pytest.approx({"gateway": 3.0, "pass": 11.0})


def test_work_that_begins_later_slows_what_is_left():
    clock = Clock(1)
    clock.begin("a", 2.0, 1.0)
    clock.at(1.0, lambda: clock.begin("b", 4.0, 1.0))
    assert clock.run() == pytest.approx({"a": 3.0, "b": 6.0})


def test_without_shared_cores_nothing_waits():
    clock = Clock(0)
    for number in range(5):
        clock.begin(number, 1.0 + number, 4.0)
    assert clock.run() == pytest.approx({number: 1.0 + number for number in range(5)})
