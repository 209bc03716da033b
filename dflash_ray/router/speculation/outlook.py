"""What a step was planned to be, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.router.speculation.cost_model import Batch
from dflash_ray.router.speculation.records import MOST_DRAFTS, Floats, Reason

_LOG_2 = float(np.log(2.0))
PLAIN = frozenset({Reason.COLD, Reason.PROBE, Reason.REST, Reason.NO_GAIN})


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a step was planned to be: why, and what the plan allows.

    Attributes:
        num_asked, num_slots: sequences whose drafter was asked, and the slots asked for.
        max_seconds: that the step may take, the wait for its drafts included.
        asks_first: some drafter is asked for a sequence for the first time, and has its whole prompt to take in.
    """

    reason: Reason
    num_asked: int
    num_slots: int
    max_seconds: float
    planned_at: float
    asks_first: bool = False


@dataclass(frozen=True, slots=True)
class Verified:
    """The own drafts of a step, as its result tells of them.

    Attributes:
        counts: [num_slots] drafts that there were.
        log_probs: [num_slots, MOST_DRAFTS] their drafter's own; nan where there is none.
        parents: [num_slots, MOST_DRAFTS] as in `trees`; None where all are chains.
    """

    counts: Ints
    log_probs: Floats
    parents: Ints | None


@dataclass(slots=True)
class SpeculativeStep:
    """What will be verified, or is."""

    batch: Batch
    outlook: Outlook
    slots: Ints
    counts: Ints
    from_ngram: Flags
    is_free: Flags  # whose drafts were chosen here
    log_probs: Floats
    match_lens: Ints
    tokens: float  # expected
    sent_at: float = 0.0
    wait: float = 0.0
    waits: bool = False  # it was not sent ahead, for the sake of its drafts
    asked_inside: tuple[int, int] = (0, 0)  # sequences and slots that the colocated drafter drafts for after the pass
    asks_first: bool = False  # as in `Outlook`, of the colocated drafter
    parents: Ints | None = None  # of drafters' drafts, where not all are chains
    num_likely: int = 0  # rows of drafts chosen here, in expectation; of own ones the target may leave more, or fewer
    has_own: bool = False  # its own drafts were told of
    least_log_prob: float = 0.0  # below which they were cut; 0 where they were not

    @property
    def is_drafted(self) -> bool:
        """Whether drafts were asked for, or verified."""
        return bool(self.outlook.num_asked or self.asked_inside[0] or self.counts.any())

    def take(self, own: Verified) -> None:
        """Which own drafts there were is known now; until then it was how many there might be."""
        counts = np.where(self.from_ngram, self.counts, np.minimum(self.counts, own.counts[self.slots]))
        is_fixed = ~self.is_free
        num_missing = int((self.counts - counts)[is_fixed].sum()) if np.count_nonzero(is_fixed) else 0
        self.batch = self.batch.with_rows(-num_missing)
        self.has_own = True
        log_probs = own.log_probs[self.slots]
        if self.least_log_prob < 0.0:
            _guess_next(
                log_probs, counts, np.flatnonzero((counts < self.counts) & ~self.from_ngram), self.least_log_prob
            )
        self.counts, self.log_probs = counts, log_probs
        self.parents = None if own.parents is None else own.parents[self.slots]

    def keep(self, is_in: Flags) -> None:
        """Leaves out the other sequences."""
        self.slots, self.counts, self.from_ngram = self.slots[is_in], self.counts[is_in], self.from_ngram[is_in]
        self.is_free, self.log_probs = self.is_free[is_in], self.log_probs[is_in]
        self.match_lens = self.match_lens[is_in]
        self.parents = None if self.parents is None else self.parents[is_in]


def _guess_next(log_probs: Floats, counts: Ints, entries: Ints, least: float) -> None:
    """Of drafts that were cut nothing is known but that they are worth less than `least`: half as much, say.

    Args:
        log_probs: [n, k] of the drafts that were not; the next one's is put behind them.
    """
    entries = entries[counts[entries] < log_probs.shape[1]]
    is_known = np.arange(log_probs.shape[1]) < counts[entries, None]
    sums = np.where(is_known, log_probs[entries], 0.0).sum(axis=1)
    log_probs[entries, counts[entries]] = np.minimum(0.0, least - sums) - _LOG_2


NO_OUTLOOK = Outlook(Reason.FIXED, 0, 0, np.inf, 0.0)


def merged(before: Outlook, outlook: Outlook) -> Outlook:
    """A step that sequences join which got their tokens later."""
    decisive = outlook if before.reason in PLAIN else before
    return replace(
        decisive,
        num_asked=before.num_asked + outlook.num_asked,
        num_slots=before.num_slots + outlook.num_slots,
        asks_first=before.asks_first or outlook.asks_first,
        planned_at=before.planned_at,
    )


def plain_step(batch: Batch, outlook: Outlook, slots: Ints, is_free: Flags) -> SpeculativeStep:
    """A step without drafts; of nothing that decodes, where there are no slots."""
    count = len(slots)
    zeros, flags = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    log_probs = np.full((count, MOST_DRAFTS), np.nan)
    return SpeculativeStep(batch, outlook, slots, zeros, flags, is_free, log_probs, zeros, float(batch.num_sequences))
