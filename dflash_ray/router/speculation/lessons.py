"""What is learnt from a step that is over: acceptance, costs, and the account against plain decoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.router.speculation.acceptance import Acceptance
from dflash_ray.router.speculation.cost_model import CostModel
from dflash_ray.router.speculation.ledger import Ledger
from dflash_ray.router.speculation.outlook import SpeculativeStep
from dflash_ray.router.speculation.records import MOST_DRAFTS, Floats, SpeculationCounts
from dflash_ray.router.speculation.trees import depths_of

_SAMPLED = 32  # sequences that acceptance is learnt from in a step that leaves nothing to choose
_SPIKE = 1.25  # times what was expected; what a pass takes over that is the machine's doing


@dataclass(frozen=True, slots=True)
class Lesson:
    """A step that is over.

    Attributes:
        accepted: drafts of each sequence that were kept; -1 where there is no verdict.
        busy: seconds of the pass.
        draft_seconds: of the colocated drafter.
        late: seconds that a plain step came later than one that is sent ahead, as there were drafts before it.
        is_accepted: [n, MOST_DRAFTS] of a step with trees, which drafts were kept.
        num_skipped: steps before it, plain ones like it or its forerunners, that were not learnt from.
    """

    step: SpeculativeStep
    accepted: Ints
    busy: float
    draft_seconds: float
    late: float = 0.0
    is_accepted: Flags | None = None
    num_skipped: int = 0


def learn_acceptance(acceptance: Acceptance, lesson: Lesson, rates: Floats) -> None:
    """Takes the verdicts. `rates` [n, MOST_DRAFTS] are the chances that drafters' drafts had, of `rates_of`."""
    step, accepted, is_accepted = lesson.step, lesson.accepted, lesson.is_accepted
    has_drafts = (step.counts > 0) | ~np.isnan(step.log_probs[:, 0])
    has_verdict = (accepted >= 0) & has_drafts
    remote = np.flatnonzero(has_verdict & ~step.from_ngram)
    if len(remote) > _SAMPLED and not step.is_free.any():
        remote = remote[:: len(remote) // _SAMPLED]
    if len(remote):
        width = min(MOST_DRAFTS, int(step.counts[remote].max()) + 1)  # one was left out, perhaps
        slots, counts, log_probs = step.slots[remote], step.counts[remote], step.log_probs[remote, :width]
        rates = rates[remote, :width]
        if step.parents is None or is_accepted is None:
            acceptance.saw_drafts(slots, counts, accepted[remote], log_probs, rates)
        else:
            kept, parents = is_accepted[remote, :width], step.parents[remote, :width]
            acceptance.saw_trees(slots, counts, kept, log_probs, parents, rates)
    ngram = np.flatnonzero(has_verdict & step.from_ngram & (step.counts > 0))
    if len(ngram):
        acceptance.saw_ngrams(step.match_lens[ngram], step.counts[ngram], accepted[ngram])
    rested = step.slots[step.is_free & (step.from_ngram | ~has_drafts)]
    if len(rested):
        acceptance.rested(rested, 1 + lesson.num_skipped)


def learn_costs(costs: CostModel, lesson: Lesson, is_colocated: bool) -> None:
    """Takes the times of the pass, without the colocated drafter's, and of the wait for drafts."""
    step = lesson.step
    outlook, batch = step.outlook, step.batch
    costs.saw_pass(batch, _free_rows(step), lesson.busy)
    if not len(step.slots):
        return
    num_asked, num_slots = step.asked_inside if is_colocated else (outlook.num_asked, outlook.num_slots)
    if not (step.asks_first if is_colocated else outlook.asks_first):  # the next drafts will not take as long
        costs.saw_wait(num_asked, num_slots, batch.is_split, step.wait + lesson.draft_seconds)


def _free_rows(step: SpeculativeStep) -> int:
    return int(step.counts[step.is_free].sum())


def keep_account(
    costs: CostModel,
    acceptance: Acceptance,
    ledger: Ledger,
    counts: SpeculationCounts,
    lesson: Lesson,
    survival: Floats,
) -> float:
    """Compares the step with what plain decoding takes for the same tokens.

    `survival` [n, MOST_DRAFTS] is what was expected of drafters' drafts. Returns plain steps' time that was saved, with
    all luck in it.

    Must be called before acceptance is learnt from the step: its drafts count as they were worth when they were sent,
    as far as chance explains what came of them.
    """
    step, accepted = lesson.step, lesson.accepted
    batch = step.batch
    num_free = int(np.count_nonzero(step.is_free))
    if not num_free:
        return 0.0
    usual = costs.one_pass(batch)
    plain = usual + costs.host_seconds
    if lesson.num_skipped:
        ledger.add(plain, plain, lesson.num_skipped)
    if not step.is_drafted:
        late = min(lesson.late, (_SPIKE - 1) * plain)
        ledger.add(plain + late, plain)
        return -late / plain
    kept = float(np.maximum(accepted, 0)[step.is_free].sum())
    worth, variance = _worth(acceptance, step, survival)
    # What prompts take varies more than drafts cost: beside them those cost what is expected.
    expected = max(usual, costs.one_pass(batch, _free_rows(step)))
    busy = expected if batch.prefill_rows else min(lesson.busy, _SPIKE * expected)
    seconds = busy + step.wait + lesson.draft_seconds
    tokens = ledger.luck.counted(worth, variance, kept)
    decoding = plain - costs.prompt_seconds(batch)
    ledger.add(seconds, plain + decoding * tokens / num_free)
    counts.expected_tokens += step.tokens
    counts.realised_tokens += len(step.slots) + int(np.maximum(accepted, 0).sum())
    return (plain + decoding * kept / num_free - seconds) / decoding


def _worth(acceptance: Acceptance, step: SpeculativeStep, survival: Floats) -> tuple[float, float]:
    """Drafts chosen here that are accepted in expectation, and their variance."""
    if not np.count_nonzero(step.counts):
        return 0.0, 0.0
    if np.count_nonzero(step.from_ngram):
        ngrams = acceptance.ngram_survival(step.match_lens, step.counts)
        survival = np.where(step.from_ngram[:, None], ngrams, survival)
    index = np.arange(survival.shape[1])
    survival = np.where((index < step.counts[:, None]) & step.is_free[:, None], survival, 0.0)
    worths = np.add.reduce(survival, axis=1)
    depths = index if step.parents is None else np.where(step.from_ngram[:, None], index, depths_of(step.parents))
    squares = np.add.reduce(survival * (2 * depths + 1), axis=1)
    return float(worths.sum()), float((squares - worths**2).sum())
