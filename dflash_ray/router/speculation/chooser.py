"""Which step promises most tokens a second: a plain one, one with drafts, or a trial."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dflash_ray.core.arrays import Ints
from dflash_ray.router.speculation.choice import best_rows, is_drafted, share, until, worths
from dflash_ray.router.speculation.cost_model import Batch, CostModel
from dflash_ray.router.speculation.ledger import Ledger
from dflash_ray.router.speculation.outlook import Outlook, SpeculativeStep
from dflash_ray.router.speculation.pauses import ANY_LOAD, Pauses
from dflash_ray.router.speculation.records import MOST_DRAFTS, Floats, Reason

_LEAST_GAIN = 1.05  # promised over plain decoding before anything is speculated,
_DOUBT = 1.0  # and so many standard errors of the plain time;
_KEPT_GAIN = 1.0  # and while drafts have been paying
_TRIAL_RATE = 0.7  # acceptance that a trial hopes for
_TRIAL_ROOM = 0.5  # of the loss that is allowed
_AT_RISK = 0.5  # of what a step may lose, before its result is there
_SPARE_SLOTS = 2  # asked for beyond what is expected to be verified, where slots cost time
_SLOT_PRICE = 0.02  # of a step's time
_MOST_OF = 0.75  # of a batch must be able to be drafted for, or it does not show what such a load is like
_HOPE = np.cumprod(np.full(MOST_DRAFTS, _TRIAL_RATE))


class Rows(NamedTuple):
    """Rows of drafts in a step.

    Attributes:
        best: how many promise most.
        tokens: of the step then, in expectation.
        most: how many the plan allows.
        price: of a row, in tokens: what is worth less makes the step dearer than it gives.
    """

    best: int
    tokens: float
    most: int
    price: float


class Chooser:
    """Weighs what drafts promise against what they cost, within what the account and the pauses allow."""

    def __init__(self, costs: CostModel, ledger: Ledger, pauses: Pauses) -> None:
        self._costs, self._ledger, self._pauses = costs, ledger, pauses

    def choose(
        self,
        drafts: Floats,
        ngrams: Floats,
        draft_room: Ints,
        batch: Batch,
        max_rows: int,
        fixed: Ints,
        is_colocated: bool,
        at_risk: float = 0.0,
    ) -> tuple[Reason, Ints | None, float]:
        """Why, what to ask of drafters, and how long the step may take.

        Args:
            drafts, ngrams: [n, MOST_DRAFTS] chances that drafts of either kind, and all before them, are accepted.
            draft_room: [n] drafts that each sequence's drafter may be asked for.
            batch: the step without any drafts that are chosen here.
            max_rows: of those.
            fixed: [n] drafts that are asked for whatever they promise.
            at_risk: seconds that steps in flight may lose, which the account does not know of yet.
        """
        reason = self._plain_reason(batch)
        if reason is not None:
            return reason, None, np.inf
        if at_risk and not self._costs.knows_wait(batch.is_split):  # nor what the drafts under way will have cost
            return Reason.NO_GAIN, None, np.inf
        num_fixed, fixed_slots = int(np.count_nonzero(fixed)), int(fixed.sum())
        usual = self._costs.one_pass(batch)
        plain = usual + self._costs.one_wait(num_fixed, fixed_slots, batch.is_split, usual)
        prompts = self._costs.prompt_seconds(batch)
        plain_rate = batch.num_sequences / (plain - prompts)
        least = _KEPT_GAIN if self._pauses.is_gaining else _LEAST_GAIN + _DOUBT * self._costs.plain_error(batch)
        promised = least * plain_rate
        room = self._ledger.room(plain - prompts) - at_risk
        most_slots = int(draft_room.max(initial=0))

        def best(drafts: Floats, most: float) -> tuple[float, float, Ints]:
            """Tokens a second in `most` seconds a step and in any, and what to ask for the former."""
            options = worths(drafts, ngrams, max(0, max_rows))
            # A row's draft has to be asked for, and a few more.
            drafted = options.num_drafted[:, None]
            slots = fixed_slots + np.minimum(most_slots * drafted, options.rows + _SPARE_SLOTS * drafted)
            waits = self._costs.wait_seconds(num_fixed + drafted, slots, batch.is_split, usual)
            seconds = self._costs.pass_seconds(batch, options.rows) + waits
            rates = (batch.num_sequences + options.gains) / (seconds - prompts)
            rates[:, 0] = 0.0  # without a draft's row it is a plain step
            allowed = np.where(seconds <= most, rates, 0.0)
            level, column = divmod(int(np.argmax(allowed)), rates.shape[1])
            asks = np.where(is_drafted(options, level), draft_room, 0)
            if asks.any():
                asks = self._spare(asks, drafts, int(options.rows[column]), batch, float(seconds[level, column]))
            return float(allowed[level, column]), float(rates.max()), asks

        rate, unbound, asks = best(drafts, plain + room)
        if rate >= promised and asks.any() and not self._may_draft(is_colocated):
            return Reason.NO_GAIN, None, np.inf
        if rate >= promised:
            self._pauses.has_hope(batch.num_sequences)
            if not batch.prefill_rows and self._pauses.probes(rate / plain_rate):
                return Reason.PROBE, None, np.inf
            return Reason.GAIN, asks, plain + room
        num_hopeful = np.count_nonzero(draft_room)
        if num_hopeful and self._pauses.is_trial_due:
            hope = np.maximum(drafts, until(_HOPE[None], draft_room))
            rate, hoped, asks = best(hope, plain + _TRIAL_ROOM * room)
            if hoped < promised:
                self._pauses.no_hope(batch.num_sequences if num_hopeful >= _MOST_OF * len(draft_room) else ANY_LOAD)
            elif rate < promised or not asks.any():
                if not at_risk:
                    self._pauses.rest()
            elif self._may_draft(is_colocated):
                self._pauses.has_hope(batch.num_sequences)
                return Reason.TRIAL, asks, plain + room
        if unbound >= promised:
            if not at_risk:  # else it may be allowed as soon as a result is there
                self._pauses.rest()
            return Reason.REST, None, np.inf
        return Reason.NO_GAIN, None, np.inf

    def _spare(self, asks: Ints, drafts: Floats, num_rows: int, batch: Batch, seconds: float) -> Ints:
        """All that drafters give where slots cost nothing, otherwise a few more than are expected to be verified."""
        price = self._costs.slot_seconds(batch.is_split) * float(asks.sum())
        if price <= _SLOT_PRICE * seconds:
            return asks
        wanted = share(drafts * (asks > 0)[:, None], num_rows) + _SPARE_SLOTS
        return np.minimum(asks, wanted)

    def rows(self, survival: Floats, batch: Batch, max_rows: int, outlook: Outlook) -> Rows:
        """How many rows promise most; the wait for the drafts is part of it whatever is chosen."""
        rows, gains = best_rows(survival, max(0, max_rows))
        passes = self._costs.pass_seconds(batch, rows)
        wait = self._costs.one_wait(outlook.num_asked, outlook.num_slots, batch.is_split, float(passes[0]))
        seconds = passes + wait
        rates = (batch.num_sequences + gains) / (seconds - self._costs.prompt_seconds(batch))
        rates[1:][seconds[1:] > outlook.max_seconds] = 0.0
        best = int(np.argmax(rates))
        most = int(np.max(rows, where=seconds <= outlook.max_seconds, initial=0))
        price = float(passes[-1] - passes[0]) / max(1, int(rows[-1]))
        return Rows(int(rows[best]), batch.num_sequences + float(gains[best]), most, float(rates[best]) * price)

    def at_risk(self, step: SpeculativeStep) -> float:
        """Seconds that a step is thought to lose which takes longer than a plain one: all if no draft is accepted."""
        if not step.is_drafted:
            return 0.0
        usual = self._costs.one_pass(step.batch)
        rows = self._costs.one_pass(step.batch, step.num_likely) - usual if step.num_likely else 0.0
        wait = self._costs.one_wait(*step.asked_inside, step.batch.is_split, usual) - self._costs.host_seconds
        return _AT_RISK * (max(0.0, rows) + max(0.0, wait))

    def _may_draft(self, is_colocated: bool) -> bool:
        return is_colocated or self._pauses.may_draft()

    def _plain_reason(self, batch: Batch) -> Reason | None:
        """Why the step must be plain, if it must."""
        if not self._costs.is_known:
            return Reason.COLD
        if not batch.prefill_rows and self._pauses.is_cold(self._costs.num_plain(batch)):
            return Reason.COLD
        return Reason.REST if self._pauses.is_resting else None
