"""The verification operators, as sampling/ calls them: compiled where the library has them, plain torch elsewhere.

Shapes: R rows of S sequences in a plan, a shard of Vs tokens from vocab_start on, N shards, K draft candidates a row.
Logits are float32, bfloat16 or float16 [R, Vs]; penalties, bias and bans are applied to them in place. No operator
waits for the device. A step of a tensor-parallel group is: shard-local operators, a gather of their few numbers a row,
`verify_combine`, `commit`; all shards reach the same verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dflash_ray.kernels import build, reference_verify
from dflash_ray.kernels.columns import PlanTensors


def with_flat_plans(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled operator for arguments in which a plan is one: its tensors are handed over one by one."""

    def call(*arguments: Any) -> Any:
        flat: list[Any] = []
        for argument in arguments:
            flat.extend(argument) if isinstance(argument, PlanTensors) else flat.append(argument)
        return compiled(*flat)

    return call


def _operator(name: str, like: Tensor) -> Callable[..., Any]:
    if build.is_loaded_for(like.device.type):
        return with_flat_plans(getattr(torch.ops.dflash_ray, name))
    function: Callable[..., Any] = getattr(reference_verify, name)
    return function


def verify_prepare(logits: Tensor, vocab_start: int, plan: PlanTensors) -> Tensor:
    """Adjusts the logits in place; float64 [R, 2]: the largest scaled logit, and 1 where a value is NaN or +inf."""
    return _operator("verify_prepare", logits)(logits, vocab_start, plan)


def threshold_start(maxima: Tensor, plan: PlanTensors) -> Tensor:
    """State int64 [R, 3] of the threshold search, from the maxima float64 [R] over all shards; min-p is in it."""
    return _operator("threshold_start", maxima)(maxima, plan)


def threshold_histogram(
    logits: Tensor, vocab_start: int, plan: PlanTensors, maxima: Tensor, state: Tensor, round_index: int
) -> Tensor:
    """One round's counts (0 to 3, top-k) or masses (4 to 7, top-p) by the next eight key bits, int64 [R, 256]."""
    return _operator("threshold_histogram", logits)(logits, vocab_start, plan, maxima, state, round_index)


def threshold_narrow(state: Tensor, histogram: Tensor, plan: PlanTensors, round_index: int) -> None:
    """Takes the histogram of a round, summed over shards, into the state."""
    _operator("threshold_narrow", state)(state, histogram, plan, round_index)


def verify_greedy(logits: Tensor, vocab_start: int, plan: PlanTensors, adjusts: bool) -> Tensor:
    """This shard's argmax of every row: partials float64 [R, 4] (`Partial`). For plans of greedy sequences alone.

    Args:
        adjusts: apply penalties, bias and bans; False when `verify_prepare` did, or there are none.
    """
    return _operator("verify_greedy", logits)(logits, vocab_start, plan, adjusts)


def verify_coupled(logits: Tensor, vocab_start: int, plan: PlanTensors, state: Tensor | None, adjusts: bool) -> Tensor:
    """This shard's best perturbed logit of every row, or argmax of greedy rows: partials float64 [R, 4].

    Args:
        state: of the finished threshold search, or None where no row has min-p, top-k or top-p.
    """
    return _operator("verify_coupled", logits)(logits, vocab_start, plan, state, adjusts)


def verify_rejection(
    logits: Tensor,
    vocab_start: int,
    plan: PlanTensors,
    maxima: Tensor,
    state: Tensor | None,
    draft_ids: Tensor,
    draft_probs: Tensor,
) -> Tensor:
    """As `verify_coupled` after `verify_prepare`, with what rejection sampling needs: partials float64 [R, 5 + K].

    A judged row draws from the tokens that are no candidates, and tells the masses of all tokens and of each candidate.

    Args:
        draft_ids, draft_probs: int64 and float32 [R, K]: what the drafter could have proposed as the row's child, with
            its probabilities; one candidate with probability 1 for deterministic drafts, ids of -1 for no child.
    """
    operator = _operator("verify_rejection", logits)
    return operator(logits, vocab_start, plan, maxima, state, draft_ids, draft_probs)


def verify_unsharded(
    logits: Tensor,
    vocab_start: int,
    plan: PlanTensors,
    draft_ids: Tensor,
    draft_probs: Tensor,
    adjusts: bool,
    has_min_p: bool,
    has_top_k: bool,
    has_top_p: bool,
) -> Tensor:
    """Preparation, threshold search and draw in one, for a shard that is the whole vocabulary.

    Returns the partials of `verify_rejection` where drafts are given, else those of `verify_coupled`; the verdict is
    theirs. A row whose only candidate was drawn for certain may leave out what its own verdict does not need: the
    winner when it accepts, masses beside the likeliest token's when it must reject.

    Args:
        draft_ids, draft_probs: as given to `verify_rejection`; [0, 0] in coupled mode.
        has_min_p, has_top_k, has_top_p: whether a sequence of the plan has such a limit.
    """
    operator = _operator("verify_unsharded", logits)
    return operator(logits, vocab_start, plan, draft_ids, draft_probs, adjusts, has_min_p, has_top_k, has_top_p)


def verify_combine(partials: Tensor, plan: PlanTensors, draft_ids: Tensor, draft_probs: Tensor, depth: int) -> Tensor:
    """All shards' partials [N, R, C] to the verdict: int64 [S, 2 + 2 * depth] (`OutcomeColumn`).

    Args:
        draft_ids, draft_probs: as given to `verify_rejection`; [0, 0] for other partials.
        depth: rows on the longest path of the plan.
    """
    return _operator("verify_combine", partials)(partials, plan, draft_ids, draft_probs, depth)


def commit(outcome: Tensor, plan: PlanTensors, features: Tensor | None) -> Tensor:
    """Cuts accepted tokens at stop tokens and limits; int64 [S, 4] (`CommitColumn`).

    Args:
        features: [F, H]; the rows of each sequence's accepted path are moved together behind its root's, in place.
    """
    return _operator("commit", outcome)(outcome, plan, features)


def count_history(ids: Tensor, values: Tensor, ints: Tensor, slots: Tensor, counts: Tensor, tokens: Tensor) -> None:
    """Counts tokens in the histories of their sequences, in place; a history stays in the order of its ids.

    Args:
        ids, values: as in a plan, with room behind the histories for those of `tokens` that they lack.
        ints: [N, 18], a line a slot.
        slots, counts: [n] slots, and how many of `tokens` belong to each, one slot after the other.
    """
    _operator("count_history", ids)(ids, values, ints, slots, counts, tokens)


def token_logprobs(logits: Tensor, vocab_start: int, chosen: Tensor, num_top: int) -> Tensor:
    """Of this shard, float64 [Q, 3 + 2 * num_top]: maximum, sum of exp(logit - maximum), the chosen token's logit

    (-inf when it lies in another shard), and the largest logits with their tokens (-1 for none), best first.
    """
    return _operator("token_logprobs", logits)(logits, vocab_start, chosen, num_top)


def gumbel_noise(seeds: Tensor, positions: Tensor, ids: Tensor, purpose: int) -> Tensor:
    """Position-keyed standard Gumbel noise float64 [N, K] for seeds [N], positions [N] and token ids [N, K], int64."""
    return _operator("gumbel_noise", ids)(seeds, positions, ids, purpose)
