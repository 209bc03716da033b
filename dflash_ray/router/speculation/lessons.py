"""What is learnt from a step that is over: acceptance, costs, and the account against plain decoding."""

from __future__ import annotations

import numpy as np

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.router.speculation.acceptance import Acceptance
from dflash_ray.router.speculation.cost_model import CostModel
from dflash_ray.router.speculation.ledger import Ledger
from dflash_ray.router.speculation.outlook import SpeculativeStep
from dflash_ray.router.speculation.records import MOST_DRAFTS, SpeculationCounts

_SAMPLED = 32  # sequences that acceptance is learnt from in a step that leaves nothing to choose
_SPIKE = 1.25  # times what was expected; what a pass takes over that is the machine's doing


def learn_acceptance(
    acceptance: Acceptance, step: SpeculativeStep, accepted: Ints, is_accepted: Flags | None = None
) -> None:
    """Takes the verdicts; -1 where there is none. Of trees `is_accepted` [n, k] says which drafts were kept."""
    has_verdict = (accepted >= 0) & (step.counts > 0)
    remote = np.flatnonzero(has_verdict & ~step.from_ngram)
    if len(remote) > _SAMPLED and not step.is_free.any():
        remote = remote[:: len(remote) // _SAMPLED]
    if len(remote):
        width = min(MOST_DRAFTS, int(step.counts[remote].max()))
        slots, counts, log_probs = step.slots[remote], step.counts[remote], step.log_probs[remote, :width]
        if step.parents is None or is_accepted is None:
            acceptance.saw_drafts(slots, counts, accepted[remote], log_probs)
        else:
            kept, parents = is_accepted[remote, :width], step.parents[remote, :width]
            acceptance.saw_trees(slots, counts, kept, log_probs, parents)
    ngram = np.flatnonzero(has_verdict & step.from_ngram)
    if len(ngram):
        acceptance.saw_ngrams(step.match_lens[ngram], step.counts[ngram], accepted[ngram])
    rested = step.slots[step.from_ngram | (step.counts == 0)]
    if len(rested):
        acceptance.rested(rested)


def learn_costs(costs: CostModel, step: SpeculativeStep, busy: float, draft_seconds: float, is_colocated: bool) -> None:
    """Takes the times of the pass, without the colocated drafter's, and of the wait for drafts."""
    outlook, batch = step.outlook, step.batch
    costs.saw_pass(batch, _free_rows(step), busy)
    num_asked, num_slots = step.asked_inside if is_colocated else (outlook.num_asked, outlook.num_slots)
    costs.saw_wait(num_asked, num_slots, batch.is_split, step.wait + draft_seconds)


def _free_rows(step: SpeculativeStep) -> int:
    return int(step.counts[step.is_free].sum())


def keep_account(
    costs: CostModel,
    ledger: Ledger,
    counts: SpeculationCounts,
    step: SpeculativeStep,
    accepted: Ints,
    busy: float,
    draft_seconds: float,
) -> None:
    """Compares the step with what plain decoding takes for the same tokens."""
    outlook, batch = step.outlook, step.batch
    counts.steps[outlook.reason] += 1
    num_free = int(np.count_nonzero(step.is_free))
    if not num_free:
        return
    kept = np.maximum(accepted, 0)[step.is_free]
    expected = costs.pass_seconds(batch, np.array([0, _free_rows(step)]))
    plain = float(expected[0]) + costs.host_seconds
    if outlook.num_asked or step.asked_inside[0] or step.counts.any():
        seconds = min(busy, _SPIKE * float(expected[1])) + step.wait + draft_seconds
        ledger.add(seconds, plain * (1.0 + float(kept.sum()) / num_free))
        counts.expected_tokens += step.tokens
        counts.realised_tokens += len(step.slots) + int(np.maximum(accepted, 0).sum())
    else:
        ledger.add(plain, plain)
