"""Which drafts stay and which token follows, exactly by the target's law.

Terms: a row's draw is the target's token after that row. The walk starts at a sequence's root and moves to the child
whose token is accepted; accepted drafts are the rows it visits after the root; the next token is what closes the walk.

Coupled mode (the default): the draw is argmax of (scaled logit + Gumbel noise of that position and token), a child is
accepted iff it is the draw. So every token is the one that plain decoding would have drawn, whatever was drafted.
Rejection mode, for chains: a child x is accepted with probability min(1, target_probs(x) / draft_probs(x)), and after a
rejection the next token is drawn from what target_probs has beyond draft_probs (Leviathan et al. 2023).

The arithmetic is the operators' (kernels/verify_ops.py); here is their order and what crosses between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dflash_ray.kernels import verify_ops as ops
from dflash_ray.kernels.columns import NUM_TOP_K_ROUNDS, CommitColumn, OutcomeColumn
from dflash_ray.sampling.columns import PlanColumns, to_columns
from dflash_ray.sampling.logprobs import Logprobs, token_logprobs
from dflash_ray.sampling.plan import NO_LOGPROBS, SequencePlan
from dflash_ray.sampling.shards import ShardGroup


@dataclass(slots=True)
class SequenceOutcome:
    """What a step decided for one sequence.

    Attributes:
        accepted_rows: rows of the accepted drafts, in order; the root is not among them.
        tokens: the accepted drafts' tokens and the next token, cut after a stop token and at the length limit.
        is_flagged: the logits were not finite; nothing else is valid.
        finish: 0 goes on, 1 ended by a stop token, 2 by the length limit.
        kv_len: rows whose keys and values stay.
        logprobs: of each token, when asked.
    """

    accepted_rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    is_flagged: bool = False
    finish: int = 0
    kv_len: int = 0
    logprobs: Logprobs | None = None


@torch.inference_mode()
def verify(
    logits: Tensor, vocab_start: int, plan: Sequence[SequencePlan], group: ShardGroup, features: Tensor | None = None
) -> list[SequenceOutcome]:
    """Decides a step. Collective over the ranks of `group`; all of them return the same.

    Args:
        logits: [R, Vs] of this rank's tokens vocab_start ... vocab_start + Vs - 1; rows of all sequences one after the
            other in the order of the plan. Penalties, bias and bans are written into them.
        plan: rows and parameters of each sequence, the same on every rank.
        features: context features [F, H] of the step on the rank that makes them; see `ops.commit`.
    """
    columns = to_columns(plan, logits.device)
    raw = _rows_for_logprobs(logits, plan)
    outcome, commits = launch(logits, vocab_start, columns, group, features)
    # The one place where the host waits for the device.
    outcomes = [
        _to_outcome(line, commit, columns.depth)
        for line, commit in zip(outcome.tolist(), commits.tolist(), strict=True)
    ]
    if raw is not None:
        _add_logprobs(outcomes, raw, vocab_start, plan, group)
    return outcomes


def launch(
    logits: Tensor, vocab_start: int, columns: PlanColumns, group: ShardGroup, features: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All operators of a step, without waiting for the device: results of `ops.verify_combine` and `ops.commit`."""
    partials = group.all_gather(_partials(logits, vocab_start, columns, group))
    outcome = ops.verify_combine(partials, columns.tensors, columns.draft_ids, columns.draft_probs, columns.depth)
    return outcome, ops.commit(outcome, columns.tensors, features)


def _partials(logits: Tensor, vocab_start: int, columns: PlanColumns, group: ShardGroup) -> Tensor:
    """This shard's numbers, after what thresholds and rejection need of all shards."""
    plan, adjusts = columns.tensors, columns.has_adjustments
    if columns.is_greedy:
        return ops.verify_greedy(logits, vocab_start, plan, adjusts)
    if not columns.has_thresholds and not columns.is_rejection:
        return ops.verify_coupled(logits, vocab_start, plan, None, adjusts)
    drafts = (columns.draft_ids, columns.draft_probs)
    if group.size == 1:
        limits = (columns.has_min_p, columns.has_top_k, columns.has_top_p)
        return ops.verify_unsharded(logits, vocab_start, plan, *drafts, adjusts, *limits)
    maxima = group.all_gather(ops.verify_prepare(logits, vocab_start, plan)[:, 0].contiguous()).amax(0)
    state = _threshold(logits, vocab_start, columns, maxima, group) if columns.has_thresholds else None
    if columns.is_rejection:
        return ops.verify_rejection(logits, vocab_start, plan, maxima, state, *drafts)
    return ops.verify_coupled(logits, vocab_start, plan, state, False)


def _threshold(logits: Tensor, vocab_start: int, columns: PlanColumns, maxima: Tensor, group: ShardGroup) -> Tensor:
    """The lowest value that min-p, top-k and top-p keep, in this order, as the state of a finished search."""
    state = ops.threshold_start(maxima, columns.tensors)
    rounds = [
        *(range(NUM_TOP_K_ROUNDS) if columns.has_top_k else ()),
        *(range(NUM_TOP_K_ROUNDS, 2 * NUM_TOP_K_ROUNDS) if columns.has_top_p else ()),
    ]
    for index in rounds:
        histogram = ops.threshold_histogram(logits, vocab_start, columns.tensors, maxima, state, index)
        ops.threshold_narrow(state, group.all_gather(histogram).sum(0), columns.tensors, index)
    return state


def _to_outcome(line: list[int], commit: list[int], depth: int) -> SequenceOutcome:
    if line[OutcomeColumn.IS_FLAGGED]:
        return SequenceOutcome(is_flagged=True)
    rows_at = OutcomeColumn.TOKENS + depth
    return SequenceOutcome(
        accepted_rows=line[rows_at : rows_at + line[OutcomeColumn.NUM_ACCEPTED]],
        tokens=line[OutcomeColumn.TOKENS :][: commit[CommitColumn.NUM_TOKENS]],
        finish=commit[CommitColumn.FINISH],
        kv_len=commit[CommitColumn.KV_LEN],
    )


def _rows_for_logprobs(logits: Tensor, plan: Sequence[SequencePlan]) -> Tensor | None:
    """A copy of the raw logits where log-probabilities are wanted: verification may write into them."""
    return logits.clone() if any(sequence.num_logprobs != NO_LOGPROBS for sequence in plan) else None


def _add_logprobs(
    outcomes: list[SequenceOutcome], raw: Tensor, vocab_start: int, plan: Sequence[SequencePlan], group: ShardGroup
) -> None:
    """Log-softmax of the raw logits for the tokens kept, and the likeliest ones. Collective."""
    asking, visited, chosen = [], [], []
    first = 0
    for sequence, outcome in zip(plan, outcomes, strict=True):
        if sequence.num_logprobs != NO_LOGPROBS and not outcome.is_flagged:
            asking.append((outcome, sequence.num_logprobs))
            path = [0, *outcome.accepted_rows][: len(outcome.tokens)]
            visited += [first + row for row in path]
            chosen += outcome.tokens
        first += sequence.num_rows
    if not chosen:
        return
    num_top = max(count for _, count in asking)
    rows = raw[torch.tensor(visited, device=raw.device)]
    logprobs = token_logprobs(rows, vocab_start, chosen, num_top, group)
    at = 0
    for outcome, count in asking:
        stop = at + len(outcome.tokens)
        outcome.logprobs = logprobs.part(at, stop, count)
        at = stop
