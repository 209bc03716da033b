"""What steps take: seconds of a target pass, and of the wait for drafts before it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from dflash_ray.core.arrays import Ints
from dflash_ray.router.speculation.pass_times import KEPT, PassTimes, bucket
from dflash_ray.router.speculation.records import Floats

_LEAST_PASS_S = 1e-6  # no pass is quicker, whatever was measured
_LATENESS_WEIGHT = 0.4
_LATENESS_FADE = 0.01  # with each step that waits for no draft
_MOST_LATENESS = 20.0
_LATE = 1.5
_FORGOTTEN_AFTER = 1024  # steps that wait for no draft: drafters may be quicker by then, and nobody would know


@dataclass(frozen=True, slots=True)
class Batch:
    """What decodes in a step besides drafts.

    Attributes:
        num_sequences: that decode.
        num_rows: of their anchors, of drafts that are not chosen here, and of prompts' chunks.
        context_tokens: of all of them together.
        prefill_rows: of prompts' chunks.
        is_split: there are two cohorts, and this is one of them.
    """

    num_sequences: int
    num_rows: int
    context_tokens: int
    prefill_rows: int = 0
    is_split: bool = False

    def with_rows(self, more: int) -> Batch:
        """With so many more rows of drafts that are not chosen here."""
        return replace(self, num_rows=self.num_rows + more) if more else self


class CostModel:
    """Seconds of a step: the target's pass, and what drafting adds to the time between two passes.

    What drafting adds is measured where it hurts, as the time from a pass's result to the next pass: that has the
    drafter's own time in it, the network, and the router; with two cohorts only what the other cohort's pass did not
    hide; for a colocated drafter its time inside the step. Cores that drafters and the target share show in the pass
    itself, whose times are kept apart for split batches.
    """

    def __init__(self) -> None:
        # Terms: 1, rows, sequences, thousand context tokens, rows of prompts.
        self._passes = PassTimes([1.0, 0.04, 0.01, 0.01, 0.01], [1.0, 1.0, 1.0, 0.0, 0.0])
        # Terms: 1, sequences drafted for, slots of all of them.
        self._waits = _unknown_waits()
        self._undrafted = 0  # steps since a draft was waited for
        self._lateness = 1.0  # of the last drafts, over what was usual: drafters that hang must not be waited for twice
        self._host: deque[float] = deque(maxlen=KEPT)  # from a result to the next pass where no draft is waited for

    @property
    def is_known(self) -> bool:
        """Whether anything can be said of the target's passes."""
        return self._passes.is_known

    def knows_wait(self, is_split: bool) -> bool:
        """Whether a draft was ever waited for."""
        return self._waits[is_split].is_known

    def num_plain(self, batch: Batch) -> int:
        """How many passes of such a batch without drafts were timed lately."""
        return self._passes.num_seen(_group(batch), batch.num_rows)

    def plain_error(self, batch: Batch) -> float:
        """How far the expected time of such a batch without drafts may be off, as a part of it."""
        return self._passes.error(_group(batch), batch.num_rows)

    def saw_pass(self, batch: Batch, draft_rows: int, seconds: float) -> None:
        rows = batch.num_rows + draft_rows
        self._passes.saw(_group(batch), rows, _pass_terms(batch, rows), seconds)

    def saw_wait(self, num_drafted: int, num_slots: int, is_split: bool, seconds: float) -> None:
        """The time from a result to the next pass, in which drafts were made for so many sequences."""
        if num_drafted == 0:
            self._host.append(seconds)
            self._lateness += _LATENESS_FADE * (1.0 - self._lateness)
            self._undrafted += 1
            if self._undrafted % _FORGOTTEN_AFTER == 0:
                self._waits = _unknown_waits()
        else:
            self._undrafted = 0
            if self._waits[is_split].is_known:
                late = seconds / self._usual_wait(num_drafted, num_slots, is_split)
                self._lateness += _LATENESS_WEIGHT * (min(_MOST_LATENESS, late) - self._lateness)
            self._waits[is_split].saw(0, num_slots, [1.0, num_drafted, num_slots], max(seconds, 1e-5))

    def pass_seconds(self, batch: Batch, draft_rows: Ints) -> Floats:
        """Of passes with so many rows of drafts [n], which rise."""
        rows = batch.num_rows + draft_rows.astype(float)
        return np.maximum(_LEAST_PASS_S, self._passes.seconds(_group(batch), rows, _pass_terms(batch, rows)))

    def one_pass(self, batch: Batch, draft_rows: int = 0) -> float:
        """As `pass_seconds`, of one pass that is thought of alone."""
        rows = batch.num_rows + draft_rows
        return max(_LEAST_PASS_S, self._passes.one(_group(batch), rows, _pass_terms(batch, rows)) * self._passes.drift)

    def prompt_seconds(self, batch: Batch) -> float:
        """What the rows of prompts add to a pass. They are computed once, whatever is drafted: no draft spares them."""
        if not batch.prefill_rows:
            return 0.0
        alone = replace(batch, num_rows=batch.num_rows - batch.prefill_rows, prefill_rows=0)
        return max(0.0, self.one_pass(batch) - self.one_pass(alone))

    @property
    def host_seconds(self) -> float:
        """Between two passes where no draft is waited for."""
        return median(self._host) if self._host else 0.0

    def wait_seconds(self, num_drafted: Ints, num_slots: Ints, is_split: bool, usual_pass: float) -> Floats:
        """Between two passes, for numbers of sequences drafted for and slots of all of them, whose shapes go together;
        where no draft was ever waited for, a third of a pass."""
        return np.where(num_drafted > 0, self._wait(num_drafted, num_slots, is_split, usual_pass), self.host_seconds)

    def one_wait(self, num_drafted: int, num_slots: int, is_split: bool, usual_pass: float) -> float:
        """As `wait_seconds`, of one wait."""
        return float(self._wait(num_drafted, num_slots, is_split, usual_pass)) if num_drafted else self.host_seconds

    def _wait(self, num_drafted: Any, num_slots: Any, is_split: bool, usual_pass: float) -> Any:
        if not self._waits[is_split].is_known:
            return self.host_seconds + usual_pass / 3
        late = self._lateness if self._lateness > _LATE else 1.0
        return late * self._usual_wait(num_drafted, num_slots, is_split)

    def _usual_wait(self, num_drafted: Any, num_slots: Any, is_split: bool) -> Any:
        waits = self._waits[is_split]
        return waits.steady(0, num_slots, (1.0, num_drafted, num_slots)) * waits.drift

    def slot_seconds(self, is_split: bool) -> float:
        """What one more slot of a draft adds to the wait."""
        return self._waits[is_split].weight(2)


def _unknown_waits() -> dict[bool, PassTimes]:
    return {is_split: PassTimes([1.0, 0.1, 0.03], [1.0, 1.0, 4.0]) for is_split in (False, True)}


def _group(batch: Batch) -> int:
    """Passes whose times are compared row by row: as many sequences, prompts or none, and as many cohorts."""
    return 4 * bucket(batch.num_sequences) + 2 * (batch.prefill_rows > 0) + batch.is_split


def _pass_terms(batch: Batch, rows: Any) -> tuple[Any, ...]:
    return 1.0, rows, batch.num_sequences, batch.context_tokens / 1000, batch.prefill_rows
