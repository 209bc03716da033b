"""Which drafts stay and which token follows, exactly by the target's law.

Terms: a row's draw is the target's token after that row. The walk starts at a sequence's root and moves to the child
whose token is accepted; accepted drafts are the rows it visits after the root; the next token is what closes the walk.

Coupled mode (the default): the draw is argmax of (scaled logit + Gumbel noise of that position and token), a child is
accepted iff it is the draw. So every token is the one that plain decoding would have drawn, whatever was drafted.
Rejection mode, for chains of one-hot drafts: a child x is accepted with probability target_probs(x), and after a
rejection the next token is drawn from target_probs without x (Leviathan et al. 2023, with draft_probs one-hot).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_ray.sampling.noise import MAX_GUMBEL, Purpose, gumbel, uniform
from dflash_ray.sampling.plan import NO_LOGPROBS, REJECTION, SequencePlan
from dflash_ray.sampling.processors import adjust_row, threshold
from dflash_ray.sampling.shards import ShardGroup

_PRUNE_FIRST = 64  # likeliest tokens whose noise sets the bound for all others


@dataclass(slots=True)
class SequenceOutcome:
    """What a step decided for one sequence.

    Attributes:
        accepted_rows: rows of the accepted drafts, in order; the root is not among them.
        tokens: the accepted drafts' tokens and the next token.
        is_flagged: the logits were not finite; nothing else is valid.
        chosen_logprobs: of each token, from the raw logits, when asked.
        top_ids, top_logprobs: [num_tokens][n], best first, when asked.
    """

    accepted_rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    is_flagged: bool = False
    chosen_logprobs: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)


@dataclass(slots=True)
class _Row:
    """One row of one shard on its way to a draw."""

    plan: SequencePlan
    index: int
    position: int  # of the token drawn here
    logits: NDArray[np.float32]


def verify(
    shard_logits: torch.Tensor, vocab_start: int, plan: Sequence[SequencePlan], group: ShardGroup
) -> list[SequenceOutcome]:
    """Decides a step. Collective over the ranks of `group`; all of them return the same.

    Args:
        shard_logits: [R, Vs] of this rank's tokens vocab_start ... vocab_start + Vs - 1; rows of all sequences one
            after the other in the order of the plan. Not modified.
        plan: rows and parameters of each sequence, the same on every rank.
    """
    raw = shard_logits.detach().float().cpu().numpy()
    rows = _rows(raw, plan)
    maxima = _all_max(_local_max(raw), group)
    finite = _all_finite(raw, maxima, group)
    draws = _draw(rows, raw, finite, vocab_start, group)
    outcomes = []
    start = 0
    for sequence in plan:
        stop = start + sequence.num_rows
        if finite[start:stop].all():
            outcome = _walk(sequence, draws[start:stop])
            if sequence.num_logprobs != NO_LOGPROBS:
                visited = [start, *(start + row for row in outcome.accepted_rows)]
                _add_logprobs(outcome, sequence.num_logprobs, raw[visited], maxima[visited], vocab_start, group)
        else:
            outcome = SequenceOutcome(is_flagged=True)
        outcomes.append(outcome)
        start = stop
    return outcomes


@dataclass(slots=True)
class _Draw:
    """What a row would emit: `token` by the law, and in rejection mode the verdict on its draft child."""

    token: int
    accepts_child: bool = False


def _rows(raw: NDArray[np.float32], plan: Sequence[SequencePlan]) -> list[_Row]:
    rows = []
    for sequence in plan:
        for index, depth in enumerate(sequence.depths()):
            rows.append(_Row(sequence, index, sequence.position + depth + 1, raw[len(rows)]))
    assert len(rows) == len(raw)
    return rows


def _local_max(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return values.max(axis=1, initial=-np.inf).astype(np.float64)


def _all_max(values: NDArray[np.float64], group: ShardGroup) -> NDArray[np.float64]:
    return values if group.size == 1 else group.all_gather(values).max(0)


def _all_finite(raw: NDArray[np.float32], maxima: NDArray[np.float64], group: ShardGroup) -> NDArray[np.bool_]:
    """Rows without NaN and with a finite maximum; -inf alone marks tokens that a model masks."""
    is_nan = np.isnan(raw.sum(axis=1)) & np.isnan(raw).any(axis=1)
    is_nan = _all_max(is_nan.astype(np.float64), group) > 0
    return ~is_nan & np.isfinite(maxima)


def _draw(
    rows: list[_Row], raw: NDArray[np.float32], finite: NDArray[np.bool_], vocab_start: int, group: ShardGroup
) -> list[_Draw]:
    """The draw of every row; rows that are not finite get token 0, which nobody reads."""
    scores = np.full((len(rows), 2), -np.inf)  # best score and its token
    residuals = np.full((len(rows), 2), -np.inf)
    masses = np.zeros((len(rows), 2))  # of the draft child, of all tokens
    for i, row in enumerate(rows):
        if finite[i]:
            _draw_row(row, i, vocab_start, group, scores, residuals, masses)
    best = _best_of_shards(scores, group)
    if not any(row.plan.mode == REJECTION for row in rows):
        return [_Draw(token) for token in best]
    other = _best_of_shards(residuals, group)
    total = group.all_gather(masses).sum(0)
    draws = []
    for i, row in enumerate(rows):
        child = _chain_child(row)
        if row.plan.mode != REJECTION or row.plan.temperature == 0 or child is None or not finite[i]:
            draws.append(_Draw(best[i], accepts_child=child is not None and best[i] == child))
            continue
        chance = uniform(row.plan.seed, row.position, np.zeros(1, dtype=np.int64), Purpose.ACCEPT)[0]
        accepts = bool(chance * total[i, 1] < total[i, 0])
        draws.append(_Draw(child if accepts else other[i], accepts_child=accepts))
    return draws


def _draw_row(
    row: _Row,
    i: int,
    vocab_start: int,
    group: ShardGroup,
    scores: NDArray[np.float64],
    residuals: NDArray[np.float64],
    masses: NDArray[np.float64],
) -> None:
    """This shard's best token of a row and, in rejection mode, its best without the draft and the masses."""
    plan = row.plan
    logits = row.logits
    if plan.has_penalties or plan.bias_ids or row.position < plan.ban_below:
        logits = logits.copy()
        adjust_row(logits, vocab_start, plan, row.index, row.position)
    if plan.temperature == 0:
        if len(logits):
            token = int(logits.argmax())
            scores[i] = logits[token], token + vocab_start
        return
    scaled = logits / np.float32(plan.temperature)
    row_max = float(_all_max(_local_max(scaled[None]), group)[0])
    floor = np.float32(-np.inf)
    if plan.min_p > 0 or plan.top_k > 0 or plan.top_p < 1:
        floor = threshold(scaled, row_max, plan, group)
    scores[i] = _perturbed_max(scaled, floor, vocab_start, plan.seed, row.position, Purpose.TARGET, None)
    child = _chain_child(row)
    if plan.mode == REJECTION and child is not None:
        kept = np.where(scaled >= floor, scaled, -np.inf).astype(np.float64)
        mass = np.exp(kept - row_max)
        is_local = 0 <= child - vocab_start < len(mass)
        masses[i] = mass[child - vocab_start] if is_local else 0.0, mass.sum()
        residuals[i] = _perturbed_max(scaled, floor, vocab_start, plan.seed, row.position, Purpose.RESIDUAL, child)


def _chain_child(row: _Row) -> int | None:
    """Token of the row's first child, or None for a leaf."""
    for index in range(row.index + 1, row.plan.num_rows):
        if row.plan.parents[index] == row.index:
            return row.plan.tokens[index]
    return None


def _perturbed_max(
    scaled: NDArray[np.float32],
    floor: np.float32,
    vocab_start: int,
    seed: int,
    position: int,
    purpose: Purpose,
    without: int | None,
) -> tuple[float, float]:
    """Best (score, token) of scaled logits plus Gumbel noise over tokens at or above the floor.

    The noise is bounded, so only tokens within its bound of the running best are drawn: an exact pruning.
    """

    def best(ids: NDArray[np.int64]) -> tuple[float, float]:
        if without is not None:
            ids = ids[ids != without - vocab_start]
        if not len(ids):
            return -np.inf, -np.inf
        noisy = scaled[ids].astype(np.float64) + gumbel(seed, position, ids + vocab_start, purpose)
        at = int(noisy.argmax())
        return float(noisy[at]), float(ids[at] + vocab_start)

    if len(scaled) > 4 * _PRUNE_FIRST:
        likely = np.argpartition(scaled, -_PRUNE_FIRST)[-_PRUNE_FIRST:]
        bound, _ = best(np.sort(likely[scaled[likely] >= floor]))
        floor = max(floor, np.float32(bound - MAX_GUMBEL - 1e-3))
    ids = np.flatnonzero((scaled >= floor) & (scaled > -np.inf))
    return best(ids)


def _best_of_shards(scores: NDArray[np.float64], group: ShardGroup) -> list[int]:
    """The token of the highest score over all shards; the lowest token id where scores are equal."""
    gathered = group.all_gather(scores) if group.size > 1 else scores[None]
    # Shards come in ascending order of their tokens, and argmax takes the first.
    shard = gathered[:, :, 0].argmax(0)
    tokens = gathered[shard, np.arange(len(scores)), 1]
    return [int(token) if np.isfinite(token) else 0 for token in tokens]


def _walk(plan: SequencePlan, draws: Sequence[_Draw]) -> SequenceOutcome:
    """From the root to the child that is accepted, until none is."""
    outcome = SequenceOutcome()
    row = 0
    while True:
        draw = draws[row]
        outcome.tokens.append(draw.token)
        is_judged = plan.mode == REJECTION and plan.temperature > 0
        child = None
        if not is_judged or draw.accepts_child:
            matches = (i for i in range(row + 1, plan.num_rows) if plan.parents[i] == row)
            child = next((i for i in matches if plan.tokens[i] == draw.token), None)
        if child is None:
            return outcome
        outcome.accepted_rows.append(child)
        row = child


def _add_logprobs(
    outcome: SequenceOutcome,
    num_top: int,
    rows: NDArray[np.float32],
    maxima: NDArray[np.float64],
    vocab_start: int,
    group: ShardGroup,
) -> None:
    """Log-softmax of the raw logits for the tokens drawn at `rows`, and the likeliest ones. Collective."""
    shifted = rows.astype(np.float64) - maxima[:, None]
    log_sum = np.log(group.all_gather(np.exp(shifted).sum(1)).sum(0))
    local = np.array(outcome.tokens) - vocab_start
    inside = (local >= 0) & (local < rows.shape[1])
    mine = np.where(inside, shifted[np.arange(len(local)), np.clip(local, 0, rows.shape[1] - 1)], -np.inf)
    outcome.chosen_logprobs = (group.all_gather(mine).max(0) - log_sum).tolist()
    if num_top == 0:
        return
    padded = np.full((len(rows), num_top, 2), -np.inf)
    count = min(num_top, rows.shape[1])
    order = np.argsort(-shifted, axis=1, kind="stable")[:, :count]
    padded[:, :count, 0] = np.take_along_axis(shifted, order, axis=1)
    padded[:, :count, 1] = order + vocab_start
    candidates = group.all_gather(padded).transpose(1, 0, 2, 3).reshape(len(rows), -1, 2)
    chosen = np.argsort(-candidates[:, :, 0], axis=1, kind="stable")[:, :num_top]
    best = np.take_along_axis(candidates, chosen[:, :, None], axis=1)
    outcome.top_ids = best[:, :, 1].astype(np.int64).tolist()
    outcome.top_logprobs = (best[:, :, 0] - log_sum[:, None]).tolist()
