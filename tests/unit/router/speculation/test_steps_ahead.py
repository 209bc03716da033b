"""Plans that are one result behind, of drafts that the target makes and cuts itself: as good, and as safe."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dflash_ray.router.speculation.controller import SpeculationController
from dflash_ray.router.speculation.cost_model import Batch
from dflash_ray.router.speculation.outlook import Verified
from dflash_ray.router.speculation.own_cut import OwnCut
from dflash_ray.router.speculation.records import MOST_DRAFTS, Candidates, Policy
from tests.unit.router.speculation.loop import Loop, Machine, worst_loss
from tests.unit.router.speculation.test_controller import MACHINES, MOST_LOSS, ROUNDING, STEADY


@dataclass
class Ahead(Loop):
    """A drafter inside the target; a step is sent before the result of the one before it."""

    sent: deque = field(default_factory=deque)
    least: list[float] = field(default_factory=list)  # where each step cut its drafts

    def __post_init__(self) -> None:
        super().__post_init__()
        self.controller.is_colocated = self.controller.runs_ahead = True
        self.own = np.zeros(self.num_sequences, np.int64)

    def run(self, num_steps: int) -> Ahead:
        if not self.sent:
            self.send()
        for _ in range(num_steps):
            self.send()
            self.finish(len(self.seconds))
        return self

    def send(self) -> None:
        count = self.num_sequences
        zeros, room = np.zeros(count, np.int64), np.full(count, MOST_DRAFTS)
        batch = Batch(count, count, int(self.lens.sum()))
        to_cut = Candidates(np.arange(count), room, zeros, zeros, zeros)
        unknown, every = np.full((count, MOST_DRAFTS), np.nan), np.ones(count, bool)
        counts, _ = self.controller.cut(to_cut, self.own, unknown, batch, 1000, 0, every)
        assert (counts <= self.own).all()
        least = self.controller.least_own_log_prob
        to_plan = Candidates(np.arange(count), room, np.full(count, self.draft_len), zeros, zeros)
        self.own = np.minimum(self.controller.plan(to_plan, batch, 1000, self.now), self.draft_len)
        inside = int(np.count_nonzero(self.own)), int(self.own.sum())
        self.controller.step_started(batch, every, counts, self.now, inside)
        self.sent.append((counts, least, inside[0]))

    def finish(self, number: int) -> None:
        counts, least, num_drafted = self.sent.popleft()
        count = self.num_sequences
        rates = np.array([self.accept(slot, number) for slot in range(count)])
        right = self.random.random((count, MOST_DRAFTS)) < rates[:, None]
        log_probs = np.log(np.where(right, 0.9, 0.3)) if self.says else np.full(right.shape, np.log(0.6))
        if least < 0:
            counts = np.minimum(counts, np.count_nonzero(log_probs.cumsum(axis=1) >= least, axis=1))
        accepted = np.minimum(np.cumprod(right, axis=1).sum(axis=1), counts)
        seconds = self.machine.pass_seconds(count + int(counts.sum()))
        drafting = self.machine.draft_seconds(num_drafted, number)
        self.now += self.noisy(seconds) + drafting
        size = len(self.controller._limits)
        own = Verified(np.zeros(size, np.int64), np.full((size, MOST_DRAFTS), np.nan), None)
        own.counts[:count], own.log_probs[:count] = counts, log_probs
        judged = np.full(size, -1)
        judged[:count] = accepted
        self.controller.step_done(judged, self.now, drafting, 0, seconds, None, own)
        self.controller.learn()
        self.lens += 1 + accepted
        self.counts.append(counts)
        self.least.append(least)
        self.seconds.append(seconds + drafting)
        self.plain.append(self.machine.pass_seconds(count) * (1 + self.promised(rates, counts, accepted)))


@pytest.mark.parametrize(("num_sequences", "least"), [(1, 1.7), (4, 1.5)])
def test_a_drafter_that_is_mostly_right_is_used(num_sequences, least):
    loop = Ahead(Machine(draft=0.006), num_sequences, lambda sequence, step: 0.8).run(600)
    assert loop.speedup(300) > least
    assert loop.controller.counts.realised_tokens == pytest.approx(loop.controller.counts.expected_tokens, rel=0.2)


@pytest.mark.parametrize("num_sequences", [1, 4, 16])
def test_a_drafter_of_random_weights_costs_next_to_nothing(num_sequences):
    loop = Ahead(Machine(noise=0.1), num_sequences, lambda sequence, step: 0.0).run(1500)
    assert loop.speedup(1500) > 0.97 and loop.speedup(500) > 0.985


def test_the_target_cuts_drafts_that_say_how_sure_they_are():
    blind = Ahead(Machine(), 8, lambda sequence, step: 0.6, seed=3).run(800)
    seeing = Ahead(Machine(), 8, lambda sequence, step: 0.6, seed=3, says=True).run(800)
    assert min(seeing.least[400:]) < 0 and seeing.speedup(400) > blind.speedup(400) + 0.1
    counts = seeing.controller.counts
    assert counts.realised_tokens == pytest.approx(counts.expected_tokens, rel=0.15), "cut drafts are not forgotten"


@given(machine=MACHINES, num_sequences=st.sampled_from([1, 4, 16]), accept=STEADY, seed=st.integers(0, 10))
@settings(max_examples=max(10, settings().max_examples // 10), derandomize=True)
def test_no_200_steps_are_expected_to_be_slower_than_plain_decoding_by_more_than_2_percent(
    machine, num_sequences, accept, seed
):
    loops = [Ahead(machine, num_sequences, accept, seed=number).run(320) for number in range(4 * seed, 4 * seed + 4)]
    # What a draft takes before the first one has come is known to nobody; two steps may ask for one by then.
    first_drafts = 2 * machine.draft_seconds(num_sequences, 0) / (200 * machine.pass_seconds(num_sequences))
    assert worst_loss(loops) - max(0.0, first_drafts - MOST_LOSS) <= MOST_LOSS + ROUNDING


def test_what_steps_in_flight_may_lose_is_not_lost_once_more():
    loop = Ahead(Machine(row=0.004), 1, lambda sequence, step: 0.9).run(200)
    controller = loop.controller
    assert loop.sent[0][0].sum() > 0, "the step in flight has drafts"
    lost_by_rows = 0.004 * controller._steps[0].num_likely
    assert controller._at_risk == pytest.approx((lost_by_rows + 0.011) / 2, rel=0.2)


def test_ngrams_are_waited_for_where_they_promise_more_than_the_wait_costs():
    loop = Ahead(Machine(), 1, lambda sequence, step: 0.4).run(100)
    controller, one = loop.controller, np.ones(1, np.int64)
    batch = Batch(1, 1, 100)
    for waiting, expected in ((0.001, True), (0.2, False)):
        controller._waiting = waiting
        candidates = Candidates(0 * one, 15 * one, 3 * one, 5 * one, 15 * one)
        assert controller.waits_for_ngrams(candidates, batch) == expected
    assert not controller.waits_for_ngrams(Candidates(0 * one, 15 * one, 3 * one, 0 * one, 0 * one), batch)
    assert not controller.lacks_own(0 * one, 0 * one, 3 * one)
    controller.open(0, Policy.FIXED, 3)
    assert controller.lacks_own(0 * one, 0 * one, 3 * one)
    assert not controller.lacks_own(0 * one, 3 * one, 3 * one) and not controller.lacks_own(0 * one, 0 * one, 0 * one)


def test_what_a_row_must_be_worth_is_told_in_the_drafters_own_terms():
    cut, draw = OwnCut(), np.random.default_rng(0)
    assert cut.least_log_prob(0.09) == pytest.approx(np.log(0.1), abs=0.1) and cut.least_log_prob(0.0) == 0.0
    assert -0.001 < cut.least_log_prob(2.0) < 0.0, "only what is certain"
    for _ in range(3000):  # of what it says half comes true
        said = draw.uniform(0.3, 1.0, (1, 5))
        accepted = np.count_nonzero(draw.random() < said.cumprod() / 2)
        cut.saw(np.log(said), np.array([5]), np.array([accepted]))
    for worth in (0.15, 0.2, 0.3):
        assert cut.least_log_prob(worth) == pytest.approx(np.log(2 * worth), abs=0.3)


def test_what_was_always_cut_is_looked_at_again():
    cut = OwnCut()
    before = cut.least_log_prob(0.2)
    unlike, alike = np.log([[0.25]]), np.log([[0.99]])
    for _ in range(300):
        cut.saw(unlike, np.array([1]), np.array([0]))
    assert cut.least_log_prob(0.2) > before + 0.1
    for _ in range(3000):
        cut.saw(alike, np.array([1]), np.array([1]))
    assert cut.least_log_prob(0.2) == pytest.approx(before, abs=0.05)


def test_a_controller_without_steps_ahead_is_at_no_risk():
    assert SpeculationController(2)._at_risk == 0.0
