"""Steps at the target, and which sequences the next one may have. Sans-IO, a part of the scheduler."""

from __future__ import annotations

from collections import deque

import numpy as np

from dflash_ray.core.arrays import Ints
from dflash_ray.router.slot_table import DECODE, NEVER, SlotTable
from dflash_ray.router.steps import StepInFlight

_NO_SLOTS: Ints = np.zeros(0, np.int64)


class StepsInFlight:
    """Steps without a result, oldest first; the target runs them, and answers, in this order.

    Attributes:
        deadline: when the oldest should have been answered.
        last_id: of the last step that was sent.
    """

    def __init__(self, depth: int, timeout_s: float) -> None:
        self._depth = depth
        self._timeout_s = timeout_s
        self._steps: deque[StepInFlight] = deque()
        self.deadline = NEVER
        self.last_id = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def has_room(self) -> bool:
        """Whether another step may be sent; beside one with a suspect in it none may."""
        return len(self._steps) < self._depth and not (self._steps and self._steps[-1].is_alone)

    @property
    def only(self) -> StepInFlight | None:
        """The step in flight, where there is one and another one may be beside it."""
        return self._steps[0] if len(self._steps) == 1 and not self._steps[0].is_alone else None

    def add(self, step: StepInFlight, now: float) -> None:
        """A step is sent."""
        if not self._steps:
            self.deadline = now + self._timeout_s
        self._steps.append(step)
        self.last_id = step.step_id

    def take(self, step_id: int, now: float) -> StepInFlight:
        """The step that a result is for. Raises ValueError for one that is not the oldest in flight."""
        if not self._steps or self._steps[0].step_id != step_id:
            raise ValueError(f"a result for step {step_id} came out of turn")
        step = self._steps.popleft()
        self.deadline = now + self._timeout_s if self._steps else NEVER
        return step

    def lose(self, table: SlotTable) -> Ints:
        """Forgets all steps, as nothing answers them any more; returns the slots of their entries, each once."""
        lost = [step.slots[step.is_current(table)] for step in self._steps]
        self._steps.clear()
        self.deadline = NEVER
        return np.unique(np.concatenate([_NO_SLOTS, *lost]))


class Cohorts:
    """Whose turn it is. With two cohorts one is verified while the other is drafted for."""

    def __init__(self, num_cohorts: int) -> None:
        self._num_cohorts = num_cohorts
        self._next = 0

    def smaller(self, table: SlotTable) -> int:
        """Where a sequence that is admitted belongs."""
        return int(self._num_cohorts == 2 and table.num_in_cohort[1] < table.num_in_cohort[0])

    def choose(self, table: SlotTable, is_target_idle: bool) -> tuple[Ints, Ints, bool] | None:
        """Slots to decode and slots to prefill in the next step, and whether a suspect is alone in it; or None.

        A cohort decodes when none of it is in flight and all its drafts have come or have been waited for long enough.
        While a cohort waits for drafts there is no step without chains.
        """
        decoding, is_waiting = _NO_SLOTS, False
        for cohort in (self._next, 1 - self._next):
            if not table.num_in_cohort[cohort]:
                continue
            members = table.decoding(cohort)
            if not len(members) or np.count_nonzero(table.step_ids[members]):
                continue
            if not np.count_nonzero(table.draft_deadlines[members] < NEVER):
                decoding = members
                self._next = 1 - cohort if self._num_cohorts == 2 else 0
                break
            is_waiting = True
        if is_waiting and not len(decoding):
            return None
        prefilling = table.prefilling()
        if not len(decoding) and not len(prefilling):
            return None
        return _apart(table, decoding, prefilling, is_target_idle)


def choose_ahead(table: SlotTable, step: StepInFlight) -> tuple[Ints, Ints] | None:
    """Slots to decode and slots to prefill behind a step in flight, while it runs; or None.

    What it decodes gets at least one token from it, whatever that is: who does not end at that length goes on. Where
    others decode as well or are about to, or a suspect waits, the step's result is waited for; so it is where the step
    brings drafts from elsewhere than the target, as those to come would.
    """
    chains, chunks = step.chains, step.slots[: step.num_chunks]
    if step.brings_drafts or len(chains) != table.num_in_phase[DECODE] or not step.is_current(table).all():
        return None
    if len(chunks) and (table.num_prefilled[chunks] + step.rows[: len(chunks)] >= table.committed_lens[chunks]).any():
        return None
    goes_on = table.committed_lens[chains] + 1 < table.max_lens[chains]
    decoding = chains if np.count_nonzero(goes_on) == len(chains) else chains[goes_on]
    prefilling = table.prefilling()
    if not len(decoding) or np.count_nonzero(table.is_suspect[prefilling]):
        return None
    return decoding, prefilling


def _apart(table: SlotTable, decoding: Ints, prefilling: Ints, is_target_idle: bool) -> tuple[Ints, Ints, bool] | None:
    """The others together, or one suspect by itself with nothing else in flight: whoever waited longest."""
    candidates = np.concatenate((decoding, prefilling)) if len(prefilling) else decoding
    is_suspect = table.is_suspect[candidates]
    if not np.count_nonzero(is_suspect):
        return decoding, prefilling, False
    suspects, others = candidates[is_suspect], candidates[~is_suspect]
    suspect = suspects[np.argmin(table.last_steps[suspects])]
    if len(others) and table.last_steps[others].min() <= table.last_steps[suspect]:
        return decoding[~table.is_suspect[decoding]], prefilling[~table.is_suspect[prefilling]], False
    if not is_target_idle:
        return None
    return decoding[decoding == suspect], prefilling[prefilling == suspect], True
