"""The controller alone, over a machine whose times are known and drafts whose fate is decided by the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dflash_ray.router.speculation.controller import SpeculationController
from dflash_ray.router.speculation.cost_model import Batch
from dflash_ray.router.speculation.records import MOST_DRAFTS, Candidates, Policy


@dataclass
class Machine:
    """Seconds of a pass and of a draft.

    Attributes:
        noise: spread of the log of every time.
    """

    base: float = 0.030
    row: float = 0.0015
    draft: float = 0.010
    draft_sequence: float = 0.001
    noise: float = 0.0
    slow_drafts_from: int = 10**9  # step from which drafts take ten times as long

    def pass_seconds(self, rows: int) -> float:
        return self.base + self.row * rows

    def draft_seconds(self, count: int, step: int) -> float:
        seconds = (self.draft + self.draft_sequence * count) * (10 if step >= self.slow_drafts_from else 1)
        return min(0.1, seconds) if count else 0.0


@dataclass
class Loop:
    """Closed batch of `num_sequences` that never end.

    Attributes:
        accept: chance that a draft is accepted, of (sequence, step).
    """

    machine: Machine
    num_sequences: int
    accept: Callable[[int, int], float]
    draft_len: int = 7
    seed: int = 0
    policy: Policy = Policy.ADAPTIVE
    says: bool = False  # whether log-probabilities tell which drafts are right
    controller: SpeculationController = field(init=False)
    seconds: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)  # what plain decoding takes for the tokens that are expected of it
    counts: list[np.ndarray] = field(default_factory=list)  # rows of drafts, by step and sequence

    def __post_init__(self) -> None:
        self.controller = SpeculationController(max(8, self.num_sequences))
        self.random = np.random.default_rng(self.seed)
        self.now = 0.0
        self.lens = np.full(self.num_sequences, 100)
        for slot in range(self.num_sequences):
            self.controller.open(slot, self.policy, MOST_DRAFTS)

    def noisy(self, seconds: float) -> float:
        return seconds * float(np.exp(self.random.normal(0, self.machine.noise))) if self.machine.noise else seconds

    def run(self, num_steps: int) -> Loop:
        for _ in range(num_steps):
            self.step(len(self.seconds))
        return self

    def step(self, number: int) -> None:
        count = self.num_sequences
        slots = np.arange(count)
        zeros = np.zeros(count, np.int64)
        room = np.full(count, MOST_DRAFTS)
        batch = Batch(count, count, int(self.lens.sum()))
        candidates = Candidates(slots, room, np.full(count, self.draft_len), zeros, zeros)
        asks = self.controller.plan(candidates, batch, 1000, self.now)
        began = self.now
        wait = self.machine.draft_seconds(int(np.count_nonzero(asks)), number)
        self.now += self.noisy(wait)
        lens = np.minimum(asks, self.draft_len)
        rates = np.array([self.accept(int(slot), number) for slot in slots])
        right = self.random.random((count, MOST_DRAFTS)) < rates[:, None]
        log_probs = np.full((count, MOST_DRAFTS), np.nan)
        sure = np.where(right, 0.9, 0.3) if self.says else np.full(right.shape, 0.6)
        index = np.arange(MOST_DRAFTS)
        log_probs[index < lens[:, None]] = np.log(sure)[index < lens[:, None]]
        counts, _ = self.controller.cut(candidates, lens, log_probs, batch, 1000)
        assert (counts <= lens).all()
        self.controller.step_started(batch, np.ones(count, bool), counts, self.now)
        accepted = np.minimum(np.cumprod(right, axis=1).sum(axis=1), counts)
        seconds = self.machine.pass_seconds(count + int(counts.sum()))
        self.now += self.noisy(seconds)
        self.controller.step_done(accepted, self.now)
        self.controller.learn()
        self.lens += 1 + accepted
        self.counts.append(counts)
        self.seconds.append(wait + seconds)
        self.plain.append(self.machine.pass_seconds(count) * (1 + self.promised(rates, counts, accepted)))
        assert self.now > began

    def promised(self, rates: np.ndarray, counts: np.ndarray, accepted: np.ndarray) -> float:
        """Drafts of a sequence that are accepted in expectation; as they came, where drafts tell right from wrong."""
        if self.says:
            return float(accepted.mean())
        survival = np.cumprod(np.repeat(rates[:, None], MOST_DRAFTS, axis=1), axis=1)
        return float((survival * (np.arange(MOST_DRAFTS) < counts[:, None])).sum(axis=1).mean())

    @property
    def rows(self) -> list[int]:
        return [int(counts.sum()) for counts in self.counts]

    def speedup(self, last: int) -> float:
        return sum(self.plain[-last:]) / sum(self.seconds[-last:])

    def worst_loss(self) -> float:
        return worst_loss([self])


def worst_loss(loops: list[Loop], window: int = 200) -> float:
    """Over all windows of so many steps: time lost against plain decoding, as a part of it, by all loops together."""
    seconds = np.cumsum([0.0, *np.sum([loop.seconds for loop in loops], axis=0)])
    plain = np.cumsum([0.0, *np.sum([loop.plain for loop in loops], axis=0)])
    window = min(window, len(seconds) - 1)
    return float(((seconds[window:] - seconds[:-window]) / (plain[window:] - plain[:-window])).max()) - 1
