"""What the scheduler asks before it drafts, before it verifies, and tells when a step is done.

The text of a request never depends on anything here, only when it comes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.router.speculation.acceptance import Acceptance
from dflash_ray.router.speculation.choice import share, until
from dflash_ray.router.speculation.chooser import Chooser
from dflash_ray.router.speculation.cost_model import Batch, CostModel
from dflash_ray.router.speculation.ledger import Ledger
from dflash_ray.router.speculation.lessons import Lesson, keep_account, learn_acceptance, learn_costs
from dflash_ray.router.speculation.outlook import (
    NO_OUTLOOK,
    PLAIN,
    Outlook,
    SpeculativeStep,
    Verified,
    merged,
    plain_step,
)
from dflash_ray.router.speculation.own_cut import OwnCut
from dflash_ray.router.speculation.pauses import Pauses
from dflash_ray.router.speculation.records import MOST_DRAFTS, Candidates, Floats, Policy, Reason, SpeculationCounts
from dflash_ray.router.speculation.trees import survival_from

_TRIAL_EACH = 4  # a trial verifies one draft for so many sequences at least
_HAND_OVER_RATE = 0.1  # of the newest step in what is known of steps ahead
_LEARNT_FROM = 4  # of steps that leave nothing to choose, or in which nothing has paid for long, one in so many teaches


class SpeculationController:
    """The speculation of one target group.

    Args:
        num_slots: sequences at a time.

    Attributes:
        prefers_ngram: whether n-grams may take a drafter's place.
        is_colocated: the drafter drafts behind a step's pass, inside the step.
        makes_features: [num_slots] context features are made of the slot's rows.
        runs_ahead: a step of which it is known what it is to be is sent while the step before it runs.
    """

    def __init__(self, num_slots: int, prefers_ngram: bool = True, is_colocated: bool = False) -> None:
        self.prefers_ngram = prefers_ngram
        self.is_colocated = is_colocated
        self.runs_ahead = False
        self._is_fixed = np.zeros(num_slots, np.bool_)
        self._has_fixed = False  # some slot wants a fixed number, or did when it was in use
        self._is_free = np.zeros(num_slots, np.bool_)  # whose drafts are chosen here
        self._limits = np.zeros(num_slots, np.int64)
        self.makes_features = np.zeros(num_slots, np.bool_)
        self._is_new = np.zeros(num_slots, np.bool_)  # that no drafter was asked for yet
        self.acceptance = Acceptance(num_slots, MOST_DRAFTS)
        self.costs = CostModel()
        self.ledger = Ledger()
        self.counts = SpeculationCounts()
        self._outlooks: dict[int, Outlook] = {}
        self._cut: SpeculativeStep | None = None
        self._steps: deque[SpeculativeStep] = deque()
        self._last_result = 0.0
        self._has_drafted = False  # the step before
        self._hand_over = 0.0  # what a step ahead takes beyond its pass,
        self._waiting = 0.0  # and one that is not, beyond that
        self._waits = False  # the next step is not sent ahead, for the sake of its drafts
        self._own_cut = OwnCut()
        self._cuts_trials = True
        self._pauses = Pauses()
        self._chooser = Chooser(self.costs, self.ledger, self._pauses)
        self._lesson: Lesson | None = None
        self._num_skipped = 0  # steps since the last that was learnt from

    def open(self, slot: int, policy: Policy, draft_tokens: int) -> None:
        """A sequence has the slot, with at most so many drafts a step."""
        self._is_fixed[slot] = policy == Policy.FIXED and draft_tokens > 0
        self._has_fixed = bool(np.count_nonzero(self._is_fixed))
        self._is_free[slot] = policy == Policy.ADAPTIVE and draft_tokens > 0
        self._limits[slot] = draft_tokens
        self._is_new[slot] = True
        self.acceptance.open(slot)
        if self._is_free[slot]:
            self._pauses.opened()

    @property
    def _at_risk(self) -> float:
        """What steps before the one that is planned may lose, whose results are not known."""
        if not self.is_colocated or not self.costs.is_known:
            return 0.0
        steps = (*self._steps, self._cut) if self._cut is not None else self._steps
        return float(sum(map(self._chooser.at_risk, steps)))

    @property
    def least_own_log_prob(self) -> float:
        """Where the target is to cut the own drafts of the last `cut`; 0 where it is not."""
        return 0.0 if self._cut is None else self._cut.least_log_prob

    @property
    def has_lesson(self) -> bool:
        """Whether `learn` has something to do."""
        return self._lesson is not None

    @property
    def expects_drafts(self) -> bool:
        """Whether drafters should have the rows of adaptive sequences, because drafts may soon be asked for."""
        return self._pauses.expects_drafts

    def may_want(self, num_tokens: int, num_sequences: int) -> bool:
        """Whether drafters may be asked for an adaptive sequence that comes now and gets at most so many tokens.

        `num_sequences` are in the batch then.
        """
        return not self.costs.is_known or self._pauses.may_want(num_tokens, num_sequences)

    def wants_ngrams(self, slots: Ints, has_draft: Flags | None = None, cohort: int = 0) -> Flags:
        """For which of these it is worth while to look n-grams up: before drafts are asked for, or with those there."""
        is_fixed, is_free = self._is_fixed[slots], self._is_free[slots]
        if has_draft is None:
            may_choose = self.prefers_ngram and not self._pauses.is_resting
            is_fixed, is_free = is_fixed & may_choose, is_free & may_choose
        else:
            is_fixed &= ~has_draft
            is_free &= self._outlooks.get(cohort, NO_OUTLOOK).reason not in PLAIN
        wanted: Flags = is_fixed | is_free
        return wanted

    def passes_over(self, slots: Ints, now: float, cohort: int = 0) -> bool:
        """Whether nothing is asked for these, whatever their drafts are like: all are off, or speculation rests."""
        if self.has_fixed(slots):
            return False
        if not np.count_nonzero(self._is_free[slots]):
            return True
        if not self.costs.is_known:
            return False
        if self._pauses.is_resting:
            self._look_out(cohort, Outlook(Reason.REST, 0, 0, np.inf, now))
        elif self._pauses.is_settled:
            self._look_out(cohort, Outlook(Reason.NO_GAIN, 0, 0, np.inf, now))
        else:
            return False
        return True

    def plan(self, candidates: Candidates, batch: Batch, max_rows: int, now: float, cohort: int = 0) -> Ints:
        """Drafts that each sequence's drafter is to be asked for, 0 where it is not.

        Args:
            batch: the step without any drafts.
            max_rows: of drafts.
            now: when the sequences' tokens had come.
        """
        slots = candidates.slots
        is_fixed, is_free = self._is_fixed[slots], self._is_free[slots]
        room = np.minimum(candidates.room, self._limits[slots])
        draft_room = np.minimum(candidates.draft_room, room)
        has_free = np.count_nonzero(is_free)
        if not has_free and not np.count_nonzero(candidates.ngram_lens):
            return self._planned(cohort, Reason.FIXED, slots, np.where(is_fixed, draft_room, 0), np.inf, now)
        ngrams = self.acceptance.ngram_survival(candidates.match_lens, np.minimum(candidates.ngram_lens, room))
        drafts = until(self.acceptance.survival(slots), draft_room)
        asks = np.where(is_fixed, draft_room, 0)
        if self.prefers_ngram:
            asks[ngrams.sum(axis=1) > drafts.sum(axis=1)] = 0
        if not has_free:
            return self._planned(cohort, Reason.FIXED, slots, asks, np.inf, now)
        fixed_rows = 0
        if has_free < len(slots):
            drafts[~is_free] = 0.0
            ngrams[~is_free] = 0.0
            fixed_rows = int(room[is_fixed].sum())
        around = batch.with_rows(min(fixed_rows, max_rows))
        reason, drafted, most = self._chooser.choose(
            drafts, ngrams, draft_room, around, max_rows - fixed_rows, asks, self.is_colocated, self._at_risk
        )
        return self._planned(
            cohort, reason, slots, np.where(is_free, 0 if drafted is None else drafted, asks), most, now
        )

    def _planned(self, cohort: int, reason: Reason, slots: Ints, asks: Ints, most_seconds: float, now: float) -> Ints:
        """Keeps the plan of a step, which asks for so many drafts of each of these slots."""
        is_asked = asks > 0
        num_asked, asks_first = int(np.count_nonzero(is_asked)), False
        if num_asked:
            asked = slots[is_asked]
            asks_first = bool(np.count_nonzero(self._is_new[asked]))
            self._is_new[asked] = False
        self._look_out(cohort, Outlook(reason, num_asked, int(asks.sum()), most_seconds, now, asks_first))
        return asks

    def has_fixed(self, slots: Ints) -> bool:
        """Whether some of these want a fixed number of drafts."""
        return self._has_fixed and bool(np.count_nonzero(self._is_fixed[slots]))

    def lacks_own(self, slots: Ints, num_own: Ints, room: Ints) -> bool:
        """Whether some of these want a fixed number of drafts, have room for some, and are to get no own ones."""
        self._waits = self._has_fixed and bool(np.count_nonzero(self._is_fixed[slots] & (num_own == 0) & (room > 0)))
        return self._waits

    def waits_for_ngrams(self, candidates: Candidates, batch: Batch) -> bool:
        """Whether n-grams promise more tokens than the time brings that a step saves which does not wait for them.

        Of the candidates `draft_room` is how many own drafts are to come.
        """
        slots = candidates.slots
        if not np.count_nonzero(candidates.ngram_lens):
            return False
        ngrams = self.acceptance.ngram_survival(candidates.match_lens, candidates.ngram_lens).sum(axis=1)
        drafts = until(self.acceptance.survival(slots), candidates.draft_room).sum(axis=1)
        gain = float(np.maximum(0.0, ngrams - drafts)[self._is_free[slots]].sum())
        self._waits = gain / batch.num_sequences * self.costs.one_pass(batch) > self._waiting
        return self._waits

    def is_plain_next(self, cohort: int = 0) -> bool:
        """Whether the last plan is a plain step that asks for nothing."""
        outlook = self._outlooks.get(cohort, NO_OUTLOOK)
        return outlook.reason in PLAIN and not outlook.num_asked

    def planned_plainly(self, cohort: int = 0) -> bool:
        """The same; any other plan is forgotten, to be made anew."""
        if self.is_plain_next(cohort):
            return True
        self._outlooks.pop(cohort, None)
        return False

    def _look_out(self, cohort: int, outlook: Outlook) -> None:
        """Keeps what a step is planned to be; sequences that join it meanwhile are added to it."""
        before = self._outlooks.get(cohort)
        outlook = outlook if before is None else merged(before, outlook)
        self._outlooks[cohort] = outlook

    def cuts_plainly(self, slots: Ints, batch: Batch, cohort: int = 0) -> bool:
        """Whether none of these verifies a draft, whatever came; if so, that is the cut of the next step."""
        is_free = self._is_free[slots]
        outlook = self._outlooks.get(cohort, NO_OUTLOOK)
        if self.has_fixed(slots) or (outlook.reason not in PLAIN and np.count_nonzero(is_free)):
            return False
        self._outlooks.pop(cohort, None)
        self._cut = plain_step(batch, outlook, slots, is_free)
        return True

    def cut(
        self,
        candidates: Candidates,
        draft_lens: Ints,
        log_probs: Floats,
        batch: Batch,
        max_rows: int,
        cohort: int = 0,
        may_cut: Flags | None = None,
    ) -> tuple[Ints, Flags]:
        """How many drafts each sequence verifies in the step that is about to be sent, and whether its n-gram's.

        Args:
            draft_lens: drafts that came from drafters, or are to come from the group's own.
            log_probs: [n, MOST_DRAFTS] of them; nan where there is none.
            batch: the step without any drafts.
            may_cut: of own drafts, whether the target may leave some out by what their drafter says of them.
        """
        slots = candidates.slots
        is_free = self._is_free[slots]
        room = np.minimum(candidates.room, self._limits[slots])
        draft_lens, ngram_lens = np.minimum(draft_lens, room), np.minimum(candidates.ngram_lens, room)
        from_ngram = draft_lens == 0
        counts = np.where(self._is_fixed[slots], np.where(from_ngram, ngram_lens, draft_lens), 0)
        outlook = self._outlooks.pop(cohort, NO_OUTLOOK)
        tokens, num_likely, least = float(batch.num_sequences), 0, 0.0
        if np.count_nonzero(is_free) and outlook.reason not in PLAIN and self.costs.is_known:
            num_fixed = int(counts.sum())
            batch = batch.with_rows(min(num_fixed, max_rows))
            drafts = until(self.acceptance.survival_of(slots, log_probs, candidates.parents), draft_lens)
            ngrams = self.acceptance.ngram_survival(candidates.match_lens, ngram_lens)
            is_better = ngrams.sum(axis=1) > drafts.sum(axis=1)
            survival = np.where((is_better & is_free)[:, None], ngrams, drafts * is_free[:, None])
            rows = self._chooser.rows(survival, batch, max_rows - num_fixed, outlook)
            num_rows, num_likely, tokens = rows.best, rows.best, rows.tokens
            if outlook.reason == Reason.TRIAL:  # that something is learnt of drafts, whatever they promise
                num_rows = max(num_rows, -(-len(slots) // _TRIAL_EACH))
            is_cut = outlook.reason == Reason.GAIN or (outlook.reason == Reason.TRIAL and self._cuts_trials)
            if may_cut is not None and num_rows and is_cut and not num_fixed:
                least = self._own_cut.least_log_prob(rows.price)
                shares, leaves = share(survival, rows.most), may_cut & ~is_better
                if np.count_nonzero(leaves) < len(slots):
                    shares = np.where(leaves, shares, share(survival, num_rows))
            else:
                shares = share(survival, num_rows)
            counts = np.where(is_free, shares, counts)
            from_ngram = np.where(is_free, is_better, from_ngram)
        self._cut = SpeculativeStep(
            batch, outlook, slots, counts, from_ngram, is_free, log_probs, candidates.match_lens, tokens,
            parents=candidates.parents, num_likely=num_likely, least_log_prob=least,
        )  # fmt: skip
        return counts, from_ngram

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
        step, self._cut = self._cut or plain_step(batch, NO_OUTLOOK, _NO_SLOTS, _NO_FLAGS), None
        step.batch = batch.with_rows(int(counts[~step.is_free].sum()))
        step.counts, step.asked_inside = counts, asked_inside
        if asked_inside[0]:
            step.asks_first = self._outlooks.get(0, NO_OUTLOOK).asks_first
        if np.count_nonzero(is_in) < len(is_in):
            step.keep(is_in)
        step.sent_at = now
        is_ahead = self.runs_ahead and len(self._steps) > 0
        step.wait = 0.0 if is_ahead else max(0.0, now - max(self._last_result, step.outlook.planned_at))
        step.waits, self._waits = self._waits, False
        self._steps.append(step)

    def step_done(
        self,
        accepted: Ints,
        now: float,
        draft_seconds: float = 0.0,
        rows_spared: int = 0,
        pass_seconds: float = 0.0,
        is_accepted: Flags | None = None,
        own: Verified | None = None,
    ) -> None:
        """The oldest step in flight was answered.

        Args:
            accepted: [num_slots] drafts that were kept; -1 where there is no verdict.
            draft_seconds: of a colocated drafter.
            rows_spared: of prompts, that were not computed.
            pass_seconds: of the target alone, as it says; 0 where it does not.
            is_accepted: [num_slots, MOST_DRAFTS] of a step with trees, which drafts were kept.
            own: of a step with own drafts.
        """
        self.learn()
        step = self._steps.popleft()
        if own is not None:
            step.take(own)
            if step.outlook.reason == Reason.TRIAL:  # one in which nothing was left to verify taught nothing
                self._cuts_trials = bool(np.count_nonzero(step.counts))
        if rows_spared:
            batch = step.batch
            step.batch = replace(
                batch, num_rows=batch.num_rows - rows_spared, prefill_rows=batch.prefill_rows - rows_spared
            )
        accepted = accepted[step.slots]
        busy = max(1e-6, now - max(step.sent_at, self._last_result) - draft_seconds)
        late = 0.0
        if self.runs_ahead and pass_seconds and (self.is_colocated or not step.is_drafted):
            ahead = self._as_if_ahead(step, busy, pass_seconds)
            late = step.wait + busy - ahead if (step.waits if self.is_colocated else self._has_drafted) else 0.0
            busy = ahead
            if step.is_drafted:
                step.wait, late = late, 0.0
        self._last_result, self._has_drafted = now, step.is_drafted
        if len(step.slots):
            self.counts.steps[step.outlook.reason] += 1
        has_choice = bool(np.count_nonzero(step.is_free))
        if len(step.slots) and not late and self._skips(step, has_choice):
            return
        kept = None if is_accepted is None else is_accepted[step.slots]
        self._lesson = Lesson(step, accepted, busy, draft_seconds, late, kept, self._num_skipped)
        self._num_skipped = 0
        if has_choice and step.is_drafted:  # the next plan wants to know
            self.learn()

    def _skips(self, step: SpeculativeStep, has_choice: bool) -> bool:
        """Whether nothing is learnt from a step that is like those before it."""
        is_dull = not has_choice or (self._pauses.is_dull(step.outlook.reason) and not step.is_drafted)
        if not is_dull or self._num_skipped == _LEARNT_FROM - 1 or not self.costs.is_known:
            return False
        self._num_skipped += 1
        if has_choice:
            self._pauses.step_done(step.outlook.reason, False, False, 0.0, self._makes_features(step))
        return True

    def _makes_features(self, step: SpeculativeStep) -> bool:
        return bool(np.count_nonzero(self.makes_features[step.slots]))

    def _as_if_ahead(self, step: SpeculativeStep, busy: float, pass_seconds: float) -> float:
        """What a step takes where all are sent ahead: those that were not waited for the router as well."""
        if step.sent_at < self._last_result:
            self._hand_over += _HAND_OVER_RATE * (max(0.0, busy - pass_seconds) - self._hand_over)
            return busy
        ahead = min(busy, pass_seconds + self._hand_over)
        self._waiting += _HAND_OVER_RATE * (step.wait + busy - ahead - self._waiting)
        return ahead

    def learn(self) -> None:
        """Takes in the last step, where that was left for when there is time: it was a plain one."""
        lesson, self._lesson = self._lesson, None
        if lesson is None:
            return
        step = lesson.step
        learn_costs(self.costs, lesson, self.is_colocated)
        if not step.is_free.any() and not step.counts.any():
            return
        rates = self.acceptance.rates_of(step.slots, step.log_probs, step.parents)
        survival = survival_from(rates, step.parents)
        saved = keep_account(self.costs, self.acceptance, self.ledger, self.counts, lesson, survival)
        if step.has_own and step.parents is None:
            self._own_cut.saw(step.log_probs, np.where(step.from_ngram, 0, step.counts), lesson.accepted)
        learn_acceptance(self.acceptance, lesson, rates)
        has_hit = bool((lesson.accepted[step.is_free] > 0).any())
        self._pauses.step_done(
            step.outlook.reason, step.outlook.num_asked > 0, has_hit, saved, self._makes_features(step)
        )

    def steps_lost(self) -> None:
        """The target's stream broke: steps in flight will not be answered."""
        self._cut = self._lesson = None
        self._steps.clear()
        self._outlooks.clear()


_NO_SLOTS = np.zeros(0, np.int64)
_NO_FLAGS = np.zeros(0, np.bool_)
