"""What the scheduler asks before it drafts, before it verifies, and tells when a step is done.

The text of a request never depends on anything here, only when it comes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.router.speculation.acceptance import Acceptance
from dflash_ray.router.speculation.choice import best_rows, is_drafted, share, worths
from dflash_ray.router.speculation.cost_model import Batch, CostModel
from dflash_ray.router.speculation.ledger import Ledger
from dflash_ray.router.speculation.lessons import keep_account, learn_acceptance, learn_costs
from dflash_ray.router.speculation.outlook import (
    NO_OUTLOOK,
    PLAIN,
    Outlook,
    SpeculativeStep,
    merged,
    nothing_decodes,
)
from dflash_ray.router.speculation.pauses import Pauses
from dflash_ray.router.speculation.records import MOST_DRAFTS, Candidates, Floats, Policy, Reason, SpeculationCounts

_LEAST_GAIN = 1.10  # promised over plain decoding before anything is speculated,
_DOUBT = 1.0  # and so many standard errors of the plain time
_TRIAL_RATE = 0.7  # acceptance that a trial hopes for
_TRIAL_ROOM = 0.5  # of the loss that is allowed
_TRIAL_EACH = 4  # a trial verifies one draft for so many sequences at least
_SPARE_SLOTS = 2  # asked for beyond what is expected to be verified, where slots cost time
_SLOT_PRICE = 0.02  # of a step's time


class SpeculationController:
    """The speculation of one target group.

    Args:
        num_slots: sequences at a time.

    Attributes:
        prefers_ngram: whether n-grams may take a drafter's place.
        is_colocated: the drafter drafts behind a step's pass, inside the step.
    """

    def __init__(self, num_slots: int, prefers_ngram: bool = True, is_colocated: bool = False) -> None:
        self.prefers_ngram = prefers_ngram
        self.is_colocated = is_colocated
        self._policies = np.zeros(num_slots, np.int64)
        self._limits = np.zeros(num_slots, np.int64)
        self.acceptance = Acceptance(num_slots, MOST_DRAFTS)
        self.costs = CostModel()
        self.ledger = Ledger()
        self.counts = SpeculationCounts()
        self._outlooks: dict[int, Outlook] = {}
        self._cut: SpeculativeStep | None = None
        self._steps: deque[SpeculativeStep] = deque()
        self._last_result = 0.0
        self._pauses = Pauses()

    def open(self, slot: int, policy: Policy, draft_tokens: int) -> None:
        """A sequence has the slot, with at most so many drafts a step."""
        self._policies[slot] = policy if draft_tokens else Policy.OFF
        self._limits[slot] = draft_tokens
        self.acceptance.open(slot)

    @property
    def expects_drafts(self) -> bool:
        """Whether drafters should have the rows of adaptive sequences, because drafts may soon be asked for."""
        return self._pauses.expects_drafts

    def wants_ngrams(self, slots: Ints, has_draft: Flags | None = None, cohort: int = 0) -> Flags:
        """For which of these it is worth while to look n-grams up: before drafts are asked for, or with those there."""
        policies = self._policies[slots]
        is_fixed, is_free = policies == Policy.FIXED, policies == Policy.ADAPTIVE
        if has_draft is None:
            may_choose = self.prefers_ngram and not self._pauses.is_resting
            is_fixed, is_free = is_fixed & may_choose, is_free & may_choose
        else:
            is_fixed &= ~has_draft
            is_free &= self._outlooks.get(cohort, NO_OUTLOOK).reason not in PLAIN
        wanted: Flags = is_fixed | is_free
        return wanted

    def plan(self, candidates: Candidates, batch: Batch, max_rows: int, now: float, cohort: int = 0) -> Ints:
        """Drafts that each sequence's drafter is to be asked for, 0 where it is not.

        Args:
            batch: the step without any drafts.
            max_rows: of drafts.
            now: when the sequences' tokens had come.
        """
        slots = candidates.slots
        policies = self._policies[slots]
        is_free = policies == Policy.ADAPTIVE
        room = np.minimum(candidates.room, self._limits[slots])
        draft_room = np.minimum(candidates.draft_room, room)
        if not is_free.any() and not candidates.ngram_lens.any():
            asks = np.where(policies == Policy.FIXED, draft_room, 0)
            self._look_out(cohort, Outlook(Reason.FIXED, int(np.count_nonzero(asks)), int(asks.sum()), np.inf, now))
            return asks
        ngrams = self.acceptance.ngram_survival(candidates.match_lens, np.minimum(candidates.ngram_lens, room))
        drafts = _cut(self.acceptance.survival(slots), draft_room)
        asks = np.where(policies == Policy.FIXED, draft_room, 0)
        if self.prefers_ngram:
            asks[ngrams.sum(axis=1) > drafts.sum(axis=1)] = 0
        if not is_free.any():
            self._look_out(cohort, Outlook(Reason.FIXED, int(np.count_nonzero(asks)), int(asks.sum()), np.inf, now))
            return asks
        drafts[~is_free] = 0.0
        ngrams[~is_free] = 0.0
        fixed_rows = int(np.where(policies == Policy.FIXED, room, 0).sum())
        around = replace(batch, num_rows=batch.num_rows + min(fixed_rows, max_rows))
        reason, drafted, most = self._choose(drafts, ngrams, draft_room, around, max_rows - fixed_rows, asks)
        asks = np.where(is_free, 0 if drafted is None else drafted, asks)
        self._look_out(cohort, Outlook(reason, int(np.count_nonzero(asks)), int(asks.sum()), most, now))
        return asks

    def _look_out(self, cohort: int, outlook: Outlook) -> None:
        """Keeps what a step is planned to be; sequences that join it meanwhile are added to it."""
        before = self._outlooks.get(cohort)
        outlook = outlook if before is None else merged(before, outlook)
        self._outlooks[cohort] = outlook

    def _choose(
        self, drafts: Floats, ngrams: Floats, draft_room: Ints, batch: Batch, max_rows: int, fixed: Ints
    ) -> tuple[Reason, Ints | None, float]:
        """Why, what to ask of drafters, and how long the step may take."""
        reason = self._plain_reason(batch)
        if reason is None and self._pauses.is_settled and not ngrams.any():
            reason = Reason.NO_GAIN
        if reason is not None:
            return reason, None, np.inf
        num_fixed, fixed_slots = int(np.count_nonzero(fixed)), int(fixed.sum())
        usual = float(self.costs.pass_seconds(batch, _NONE)[0])
        plain = usual + self._wait(num_fixed, fixed_slots, batch, usual)
        plain_rate = batch.num_sequences / plain
        promised = (_LEAST_GAIN + _DOUBT * self.costs.plain_error(batch)) * plain_rate
        room = self.ledger.room(plain)
        most_slots = int(draft_room.max(initial=0))

        def best(drafts: Floats, most: float) -> tuple[float, float, Ints]:
            """Tokens a second in `most` seconds a step and in any, and what to ask for the former."""
            options = worths(drafts, ngrams, max(0, max_rows))
            asked, slots = num_fixed + options.num_drafted, fixed_slots + most_slots * options.num_drafted
            waits = self.costs.wait_seconds(asked, slots, batch.is_split, usual)
            seconds = self.costs.pass_seconds(batch, options.rows) + waits[:, None]
            rates = (batch.num_sequences + options.gains) / seconds
            rates[:, 0] = 0.0  # without a draft's row it is a plain step
            allowed = np.where(seconds <= most, rates, 0.0)
            level, column = divmod(int(np.argmax(allowed)), rates.shape[1])
            asks = np.where(is_drafted(options, level), draft_room, 0)
            if asks.any():
                asks = self._spare(asks, drafts, int(options.rows[column]), batch, float(seconds[level, column]))
            return float(allowed[level, column]), float(rates.max()), asks

        rate, unbound, asks = best(drafts, plain + room)
        if rate >= promised and asks.any() and not self._may_draft():
            return Reason.NO_GAIN, None, np.inf
        if rate >= promised:
            if not batch.prefill_rows and self._pauses.probes(rate / plain_rate):
                return Reason.PROBE, None, np.inf
            return Reason.GAIN, asks, plain + room
        if self._pauses.is_trial_due:
            hope = np.maximum(drafts, _cut(_HOPE[None], draft_room))
            rate, _, asks = best(hope, plain + _TRIAL_ROOM * room)
            if rate >= promised and asks.any():
                if self._may_draft():
                    return Reason.TRIAL, asks, plain + room
            else:
                self._pauses.no_hope()
        if unbound >= promised:
            self._pauses.rest()
            return Reason.REST, None, np.inf
        return Reason.NO_GAIN, None, np.inf

    def _spare(self, asks: Ints, drafts: Floats, num_rows: int, batch: Batch, seconds: float) -> Ints:
        """All that drafters give where slots cost nothing, otherwise a few more than are expected to be verified."""
        price = self.costs.slot_seconds(batch.is_split) * float(asks.sum())
        if price <= _SLOT_PRICE * seconds:
            return asks
        wanted = share(drafts * (asks > 0)[:, None], num_rows) + _SPARE_SLOTS
        return np.minimum(asks, wanted)

    def cut(
        self,
        candidates: Candidates,
        draft_lens: Ints,
        log_probs: Floats,
        batch: Batch,
        max_rows: int,
        cohort: int = 0,
    ) -> tuple[Ints, Flags]:
        """How many drafts each sequence verifies in the step that is about to be sent, and whether its n-gram's.

        Args:
            draft_lens: drafts that came from drafters.
            log_probs: [n, MOST_DRAFTS] of them; nan where there is none.
            batch: the step without any drafts.
        """
        slots = candidates.slots
        policies = self._policies[slots]
        room = np.minimum(candidates.room, self._limits[slots])
        draft_lens, ngram_lens = np.minimum(draft_lens, room), np.minimum(candidates.ngram_lens, room)
        from_ngram = draft_lens == 0
        counts = np.where(policies == Policy.FIXED, np.where(from_ngram, ngram_lens, draft_lens), 0)
        is_free = policies == Policy.ADAPTIVE
        outlook = self._outlooks.pop(cohort, NO_OUTLOOK)
        tokens = float(batch.num_sequences)
        batch = replace(batch, num_rows=batch.num_rows + min(int(counts.sum()), max_rows))
        if is_free.any() and outlook.reason not in PLAIN and self.costs.is_known:
            drafts = _cut(self.acceptance.survival_of(slots, log_probs, candidates.parents), draft_lens)
            ngrams = self.acceptance.ngram_survival(candidates.match_lens, ngram_lens)
            is_better = ngrams.sum(axis=1) > drafts.sum(axis=1)
            survival = np.where((is_better & is_free)[:, None], ngrams, drafts * is_free[:, None])
            num_rows, tokens = self._rows(survival, batch, max_rows - int(counts.sum()), outlook)
            if outlook.reason == Reason.TRIAL:  # that something is learnt of drafts, whatever they promise
                num_rows = max(num_rows, -(-len(slots) // _TRIAL_EACH))
            counts = np.where(is_free, share(survival, num_rows), counts)
            from_ngram = np.where(is_free, is_better, from_ngram)
        self._cut = SpeculativeStep(
            batch, outlook, slots, counts, from_ngram, is_free, log_probs, candidates.match_lens, tokens,
            parents=candidates.parents,
        )  # fmt: skip
        return counts, from_ngram

    def _rows(self, survival: Floats, batch: Batch, max_rows: int, outlook: Outlook) -> tuple[int, float]:
        """How many rows, and the tokens of the step; the wait for the drafts is part of it whatever is chosen."""
        rows, gains = best_rows(survival, max(0, max_rows))
        passes = self.costs.pass_seconds(batch, rows)
        seconds = passes + self._wait(outlook.num_asked, outlook.num_slots, batch, float(passes[0]))
        rates = (batch.num_sequences + gains) / seconds
        rates[1:][seconds[1:] > outlook.max_seconds] = 0.0
        best = int(np.argmax(rates))
        return int(rows[best]), batch.num_sequences + float(gains[best])

    def step_started(
        self, batch: Batch, is_in: Flags, counts: Ints, now: float, asked_inside: tuple[int, int] = (0, 0)
    ) -> None:
        """The step of the last `cut` was sent.

        Args:
            batch: it, without any drafts.
            is_in: whether each of the cut's sequences is in it; the others found no room.
            counts: drafts that it verifies of each.
            asked_inside: sequences and slots that a colocated drafter drafts for behind the pass.
        """
        step, self._cut = self._cut or nothing_decodes(batch), None
        fixed_rows = int(counts[~step.is_free].sum())
        step.batch = replace(batch, num_rows=batch.num_rows + fixed_rows)
        step.slots, step.counts, step.from_ngram = step.slots[is_in], counts[is_in], step.from_ngram[is_in]
        step.is_free, step.log_probs = step.is_free[is_in], step.log_probs[is_in]
        step.match_lens, step.asked_inside = step.match_lens[is_in], asked_inside
        step.parents = None if step.parents is None else step.parents[is_in]
        step.sent_at = now
        step.wait = max(0.0, now - max(self._last_result, step.outlook.planned_at))
        self._steps.append(step)

    def step_done(
        self, accepted: Ints, now: float, draft_seconds: float = 0.0, is_accepted: Flags | None = None
    ) -> None:
        """The oldest step in flight was answered.

        Args:
            accepted: [num_slots] drafts that were kept; -1 where there is no verdict.
            draft_seconds: of a colocated drafter.
            is_accepted: [num_slots, MOST_DRAFTS] of a step with trees, which drafts were kept.
        """
        step = self._steps.popleft()
        accepted = accepted[step.slots]
        busy = max(1e-6, now - max(step.sent_at, self._last_result) - draft_seconds)
        self._last_result = now
        if not len(step.slots):
            self.costs.saw_pass(step.batch, 0, busy)
            return
        learn_acceptance(self.acceptance, step, accepted, None if is_accepted is None else is_accepted[step.slots])
        learn_costs(self.costs, step, busy, draft_seconds, self.is_colocated)
        keep_account(self.costs, self.ledger, self.counts, step, accepted, busy, draft_seconds)
        self._pauses.step_done(step.outlook.reason, step.outlook.num_asked > 0, self.ledger.loss)

    def steps_lost(self) -> None:
        """The target's stream broke: steps in flight will not be answered."""
        self._cut = None
        self._steps.clear()
        self._outlooks.clear()

    def _may_draft(self) -> bool:
        return self.is_colocated or self._pauses.may_draft()

    def _plain_reason(self, batch: Batch) -> Reason | None:
        """Why the step must be plain, if it must."""
        if not self.costs.is_known:
            return Reason.COLD
        if not batch.prefill_rows and self._pauses.is_cold(self.costs.num_plain(batch)):
            return Reason.COLD
        return Reason.REST if self._pauses.is_resting else None

    def _wait(self, num_asked: int, num_slots: int, batch: Batch, usual: float) -> float:
        asked, slots = np.array([num_asked]), np.array([num_slots])
        return float(self.costs.wait_seconds(asked, slots, batch.is_split, usual)[0])


_NONE = np.zeros(1, np.int64)
_HOPE = np.cumprod(np.full(MOST_DRAFTS, _TRIAL_RATE))


def _cut(survival: Floats, lens: Ints) -> Floats:
    """Zero behind the end of each sequence's drafts."""
    return np.where(np.arange(survival.shape[1]) < lens[:, None], survival, 0.0)
