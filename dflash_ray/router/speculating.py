"""Between the scheduler's slots and the policy of speculation: columns in, columns out. A part of the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.arrays import Flags, Ints, Tokens
from dflash_ray.pb import router_pb2, target_pb2
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.ngram_drafts import NgramDrafts
from dflash_ray.router.results import StepOutcome
from dflash_ray.router.slot_table import CHAIN, COLOCATED, DECODE, MAX_DRAFTS, PLAIN, PREFILL, SlotTable
from dflash_ray.router.speculation.controller import SpeculationController
from dflash_ray.router.speculation.cost_model import Batch
from dflash_ray.router.speculation.outlook import Verified
from dflash_ray.router.speculation.records import MOST_DRAFTS, Candidates, Policy
from dflash_ray.router.steps import StepInFlight

_POLICIES = {
    router_pb2.SPECULATION_POLICY_ADAPTIVE: Policy.ADAPTIVE,
    router_pb2.SPECULATION_POLICY_FIXED: Policy.FIXED,
    router_pb2.SPECULATION_POLICY_OFF: Policy.OFF,
}
_NAMES = {"adaptive": Policy.ADAPTIVE, "fixed": Policy.FIXED, "off": Policy.OFF}


class Speculating:
    """How many drafts each slot is asked for and verifies.

    Attributes:
        table: the slots of the sequences on the target; the scheduler's.
    """

    def __init__(self, config: DflashRayConfig, table: SlotTable) -> None:
        self._router = config.router
        self._uses_ngrams = config.drafter.method != "none"
        self._uses_features = config.uses_features
        self._is_split = config.router.cohorts == 2
        self.controller = SpeculationController(config.router.max_running)
        self._set_table(table)

    def _set_table(self, table: SlotTable) -> None:
        self.table = table
        self.ngrams = NgramDrafts(table)

    def begin(self, table: SlotTable, limits: TargetLimits) -> None:
        """A target group is there; no slot is in use. What drafters there are follows from what it says."""
        if table is not self.table:
            self._set_table(table)
        self.controller.prefers_ngram = self._router.prefer_ngram and limits.has_drafter
        self.controller.is_colocated = limits.colocated_draft_tokens > 0
        self.controller.runs_ahead = self._router.runs_ahead
        self.controller.steps_lost()

    def policy_of(self, speculation: router_pb2.Speculation) -> tuple[Policy, int]:
        """What a request wants: its policy and the most drafts a step."""
        policy = _POLICIES.get(speculation.policy, _NAMES[self._router.policy])
        if policy == Policy.OFF:
            return policy, 0
        usual = self._router.draft_tokens if policy == Policy.FIXED else MOST_DRAFTS
        wanted = speculation.draft_tokens if speculation.HasField("draft_tokens") else usual
        return (policy, min(wanted, MAX_DRAFTS)) if wanted else (Policy.OFF, 0)

    def enter(self, slot: int) -> None:
        """A sequence has the slot."""
        sequence = self.table.sequence(slot)
        self.controller.open(slot, sequence.policy, sequence.draft_tokens)
        if self._uses_features and sequence.policy == Policy.ADAPTIVE and sequence.context.drafter_id is None:
            left = int(self.table.max_lens[slot] - self.table.committed_lens[slot])
            self.table.may_be_drafted[slot] &= self.controller.may_want(left, self.table.num_running)
        self.controller.makes_features[slot] = self._uses_features and self.table.may_be_drafted[slot]
        self.ngrams.clear(slot)

    def ask(self, slots: Ints, reach: Callable[[Ints, float], Ints], limits: TargetLimits, now: float) -> Ints:
        """Decides how many drafts the slots' drafters are asked for, in the table's column; returns who is to be asked.

        Args:
            slots: that have got tokens.
            reach: drafts that each slot's drafter can give at a time.
        """
        table = self.table
        table.num_asked[slots] = 0
        cohorts = [slots[table.cohorts[slots] == cohort] for cohort in (0, 1)] if self._is_split else [slots]
        for cohort, members in enumerate(cohorts):
            if len(members) and not self.controller.passes_over(members, now, cohort):
                table.num_asked[members] = self._plan(members, reach, cohort, limits, now)
        return slots[table.num_asked[slots] > 0]

    def _plan(
        self, slots: Ints, reach: Callable[[Ints, float], Ints], cohort: int, limits: TargetLimits, now: float
    ) -> Ints:
        """The controller's plan for slots of a cohort: drafts that each one's drafter is to be asked for."""
        table = self.table
        candidates = self._candidates(
            slots, table.most_drafts(slots), reach(slots, now), self.controller.wants_ngrams(slots)
        )
        batch = self._batch(table.decoding(cohort), self._rows_of_prompts(limits))
        return self.controller.plan(candidates, batch, limits.max_batch_tokens - batch.num_rows, now, cohort)

    def _candidates(self, slots: Ints, room: Ints, draft_room: Ints, wants_ngram: Flags) -> Candidates:
        match_lens, lens = np.zeros(len(slots), np.int64), np.zeros(len(slots), np.int64)
        if self._uses_ngrams and np.count_nonzero(wants_ngram):
            match_lens[wants_ngram], lens[wants_ngram] = self.ngrams.look_up(slots[wants_ngram], room[wants_ngram])
        return Candidates(slots, room, draft_room, match_lens, lens)

    def _batch(self, slots: Ints, prefill_rows: int) -> Batch:
        context = int(self.table.committed_lens[slots].sum())
        return Batch(len(slots), len(slots) + prefill_rows, context, prefill_rows, self._is_split)

    def _rows_of_prompts(self, limits: TargetLimits) -> int:
        """Of the next step, at most."""
        table = self.table
        if not table.num_in_phase[PREFILL]:
            return 0
        slots = table.prefilling()
        left = table.committed_lens[slots] - table.num_prefilled[slots]
        chunks = int(np.minimum(left, self._router.prefill_chunk_tokens).sum())
        return min(chunks, max(0, limits.max_batch_tokens - table.num_in_phase[DECODE]))

    def ask_inside(self, step: StepInFlight, is_ahead: bool, limits: TargetLimits, now: float) -> Ints:
        """Drafts that the colocated drafter is asked for behind the pass, by entry of the step that is to be sent.

        `is_ahead`: another step is to bring tokens before it.
        """
        num_asked = np.zeros(len(step.slots), np.int64)
        if limits.colocated_draft_tokens:
            entries, slots = np.arange(len(step.slots)), step.slots  # that will decode
            if step.num_chunks:
                left = self.table.committed_lens[slots] - self.table.num_prefilled[slots]
                entries = ((step.rows == 0) | (step.rows == left)).nonzero()[0]
                slots = slots[entries]
            if len(slots) and not self.controller.passes_over(slots, now):
                most = limits.colocated_draft_tokens if self._router.tree_width == 1 else MAX_DRAFTS
                reach, zeros = most * self.table.may_be_drafted[slots], np.zeros(len(slots), np.int64)
                room = self.table.most_drafts(slots, 1 + is_ahead)
                candidates = Candidates(slots, room, np.minimum(reach, room), zeros, zeros)
                batch = self._batch(slots, 0)
                num_asked[entries] = self.controller.plan(candidates, batch, limits.max_batch_tokens - len(slots), now)
        return num_asked

    def cut(self, slots: Ints, limits: TargetLimits) -> tuple[Ints, float]:
        """How many drafts each of these verifies in the next step, and where the target cuts own ones.

        N-grams are put in place where they are chosen; of a step that is sent ahead nothing is known that they follow.
        """
        table = self.table
        if not len(slots):
            return np.zeros(0, np.int64), 0.0
        is_ahead = bool(table.step_ids[slots[0]])
        cohort = int(table.cohorts[slots[0]])
        batch = self._batch(slots, self._rows_of_prompts(limits))
        if self.controller.cuts_plainly(slots, batch, cohort):
            table.draft_sources[slots] = PLAIN
            return np.zeros(len(slots), np.int64), 0.0
        has_own = limits.colocated_draft_tokens > 0
        draft_lens = np.maximum(0, (table.num_own if has_own else table.draft_lens)[slots])
        wants_ngram = self.controller.wants_ngrams(slots, draft_lens > 0, cohort) & (not is_ahead)
        room = table.most_drafts(slots, int(is_ahead))
        candidates = self._candidates(slots, room, np.zeros(len(slots), np.int64), wants_ngram)
        if table.has_trees:
            candidates = replace(candidates, parents=table.draft_parents[slots, :MOST_DRAFTS])
        wants_distributions = table.wants_distributions[slots]
        if has_own:  # what their drafter says of them the target knows
            log_probs = np.full((len(slots), MOST_DRAFTS), np.nan)
        else:
            log_probs = table.draft_log_probs[slots, :MOST_DRAFTS].astype(float)
            # The law of rejection sampling bears no cut that looks at what was drawn.
            log_probs[wants_distributions] = np.nan
        counts, from_ngram = self.controller.cut(
            candidates,
            draft_lens,
            log_probs,
            batch,
            limits.max_batch_tokens - batch.num_rows,
            cohort,
            ~wants_distributions if has_own else None,
        )
        if np.count_nonzero(from_ngram):
            self.ngrams.take(slots[from_ngram], counts[from_ngram])
        if has_own:
            own = (counts > 0) & ~from_ngram
            table.draft_lens[slots[own]], table.draft_sources[slots[own]] = counts[own], COLOCATED
        table.draft_sources[slots[counts == 0]] = PLAIN
        return counts, self.controller.least_own_log_prob

    def sent(self, decoding: Ints, step: StepInFlight, now: float, num_asked: Ints) -> None:
        """The step of the last `cut` was sent.

        Args:
            decoding: the cut's slots.
            num_asked: drafts that the colocated drafter is asked for behind the pass.
        """
        chains = step.slots[step.num_chunks :]
        counts = np.zeros(self.table.num_slots, np.int64)
        is_in = np.zeros(self.table.num_slots, np.bool_)
        counts[chains], is_in[chains] = step.num_drafts[step.num_chunks :], True
        batch = self._batch(chains, step.num_rows_of_chunks)
        inside = int(np.count_nonzero(num_asked)), int(num_asked.sum())
        self.controller.step_started(batch, is_in[decoding], counts[decoding], now, inside)

    def is_known(self, slots: Ints, reach: Callable[[Ints, float], Ints], limits: TargetLimits, now: float) -> bool:
        """Whether it is known, while the present step runs, what the next one of these is to be.

        That is so of a plain one, and of one with the drafts that the group's own drafter makes behind the present one,
        unless n-grams promise more than not waiting does.
        """
        if not np.count_nonzero(self.table.draft_tokens[slots]):
            return True
        if limits.colocated_draft_tokens:
            is_plain = self.controller.is_plain_next() and not self.controller.has_fixed(slots)
            return is_plain or not self._waits_for_ngrams(slots)
        if self.controller.has_fixed(slots):
            return False  # an n-gram may be found then
        if self.controller.passes_over(slots, now):
            return True
        self._plan(slots, reach, 0, limits, now)
        return self.controller.planned_plainly()

    def _waits_for_ngrams(self, slots: Ints) -> bool:
        """Whether the next step is to be made of the present one's tokens, with n-grams that follow them."""
        if not self._uses_ngrams:
            return False
        num_own, room = self.table.num_own[slots], self.table.most_drafts(slots, 1)
        if self.controller.lacks_own(slots, np.minimum(num_own, room), room):
            return True
        wanted = self.controller.wants_ngrams(slots, num_own > 0)
        candidates = self._candidates(slots, room, np.minimum(num_own, room), wanted)
        return self.controller.waits_for_ngrams(candidates, self._batch(slots, 0))

    def judge_ngrams(self, slots: Ints, first_tokens: Tokens) -> None:
        """The slots' next tokens have come, and pass judgement on n-grams that were not verified."""
        match_lens, is_right = self.ngrams.judged(slots, first_tokens)
        if len(match_lens):
            self.controller.acceptance.saw_ngrams(match_lens, np.ones_like(match_lens), is_right.astype(np.int64))

    def done(
        self, step: StepInFlight, outcome: StepOutcome, is_known: Flags, now: float, timings: target_pb2.StepTimings
    ) -> None:
        """The oldest step was answered; is_known[i]: entry i's sequence still has its slot, and nothing went wrong."""
        chains = slice(step.num_chunks, None)
        accepted = np.full(self.table.num_slots, -1)
        accepted[step.slots[chains]] = np.where(is_known[chains], outcome.num_accepted[chains], -1)
        has_trees = (self.table.has_trees or outcome.own_parents is not None) and step.num_rows_of_drafts > 0
        self.controller.step_done(
            accepted,
            now,
            timings.draft_ns / 1e9,
            self._rows_spared(step, outcome, is_known),
            (timings.forward_ns + timings.verify_ns) / 1e9,
            self._accepted_in_trees(step, outcome) if has_trees else None,
            self._verified(step, outcome) if np.count_nonzero(step.is_own) else None,
        )

    def _verified(self, step: StepInFlight, outcome: StepOutcome) -> Verified:
        """The own drafts of a step that is over."""
        counts = np.zeros(self.table.num_slots, np.int64)
        slots, own = step.slots[step.is_own], outcome.num_drafts[step.is_own]
        counts[slots] = own
        is_there = own[:, None] > CHAIN
        of_slots = np.full(is_there.shape, np.nan)
        of_slots[is_there] = outcome.own_log_probs
        of_slots[self.table.wants_distributions[slots]] = np.nan
        log_probs = np.full((self.table.num_slots, MOST_DRAFTS), np.nan)
        log_probs[slots] = of_slots[:, :MOST_DRAFTS]
        parents = None
        if outcome.own_parents is not None:
            parents = np.tile(CHAIN, (self.table.num_slots, 1))
            of_parents = parents[slots]
            of_parents[is_there] = np.minimum(outcome.own_parents, np.broadcast_to(CHAIN, is_there.shape)[is_there])
            parents[slots] = of_parents
            parents = parents[:, :MOST_DRAFTS]
        return Verified(counts, log_probs, parents)

    def _accepted_in_trees(self, step: StepInFlight, outcome: StepOutcome) -> Flags:
        """[num_slots, MOST_DRAFTS]: which drafts were kept."""
        is_accepted = np.zeros((self.table.num_slots, MAX_DRAFTS), np.bool_)
        entries = slice(step.num_chunks, None)
        slots, counts = step.slots[entries], outcome.num_accepted[entries]
        if outcome.accepted_drafts is None:
            is_accepted[slots] = counts[:, None] > CHAIN
        else:
            nodes = np.clip(outcome.accepted_drafts.astype(np.int64) - 1, 0, MAX_DRAFTS - 1)
            is_accepted[np.repeat(slots, counts), nodes] = True
        return is_accepted[:, :MOST_DRAFTS]

    def _rows_spared(self, step: StepInFlight, outcome: StepOutcome, is_known: Flags) -> int:
        """Rows of prompts that the step need not compute, as they were there already or another prompt's came first."""
        if not step.num_chunks:
            return 0
        chunks = is_known[: step.num_chunks].nonzero()[0]
        slots, table = step.slots[chunks], self.table
        found = outcome.cached_lens[chunks] - table.num_cached[slots]
        computed = outcome.kv_lens[chunks] - table.num_prefilled[slots] - found
        return int((step.rows[chunks] - computed).sum())
