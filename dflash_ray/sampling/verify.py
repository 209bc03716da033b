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

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.kernels import verify_ops
from dflash_ray.kernels.columns import NUM_TOP_K_ROUNDS, CommitColumn, OutcomeColumn
from dflash_ray.sampling.columns import PlanColumns
from dflash_ray.sampling.logprobs import Logprobs, token_logprobs
from dflash_ray.sampling.parameters import NO_LOGPROBS
from dflash_ray.sampling.ranks import RankGroup
from dflash_ray.sampling.table import Need

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Verdict:
    """What a step decided for its S sequences.

    Attributes:
        tokens: [S, depth] the accepted drafts' tokens and the next token, of which the first `num_tokens` are kept.
        accepted_rows: [S, depth] rows of the accepted drafts among the sequence's, the first `num_accepted` of them.
        num_tokens: [S] after a cut behind a stop token and at the length limit.
        num_accepted: [S].
        finishes: [S] of `Finish`.
        kv_lens: [S] rows whose keys and values stay.
        is_flagged: [S] the logits were not finite; nothing else of the sequence is valid.
        logprobs: of each kept token of the sequences that asked, one sequence after the other; None when nobody did.
    """

    tokens: Ints
    accepted_rows: Ints
    num_tokens: Ints
    num_accepted: Ints
    finishes: Ints
    kv_lens: Ints
    is_flagged: NDArray[np.bool_]
    logprobs: Logprobs | None = None


@torch.inference_mode()
def verify(
    logits: Tensor, vocab_start: int, columns: PlanColumns, group: RankGroup, features: Tensor | None = None
) -> Verdict:
    """Decides a step. Collective over the ranks of `group`; all of them return the same.

    Args:
        logits: [R, Vs] of this rank's tokens vocab_start ... vocab_start + Vs - 1; rows of all sequences one after the
            other in the order of the columns. Penalties, bias and bans are written into them.
        columns: rows and parameters of each sequence, the same on every rank.
        features: context features [F, H] of the step on the rank that makes them; see `verify_ops.commit`.
    """
    # A copy of the raw logits where log-probabilities are wanted: verification may write into them.
    raw = logits.clone() if columns.needs & Need.LOGPROBS else None
    # The one place where the host waits for the device.
    outcome, commits = (result.cpu().numpy() for result in launch(logits, vocab_start, columns, group, features))
    verdict = to_verdict(outcome, commits, columns.depth)
    if raw is not None:
        _add_logprobs(verdict, raw, vocab_start, columns, group)
    return verdict


def launch(
    logits: Tensor, vocab_start: int, columns: PlanColumns, group: RankGroup, features: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All operators of a step, without waiting for the device: results of `verify_combine` and `commit`."""
    partials = group.all_gather(_partials(logits, vocab_start, columns, group))
    outcome = verify_ops.verify_combine(
        partials, columns.tensors, columns.draft_ids, columns.draft_probs, columns.depth
    )
    return outcome, verify_ops.commit(outcome, columns.tensors, features)


def _partials(logits: Tensor, vocab_start: int, columns: PlanColumns, group: RankGroup) -> Tensor:
    """This shard's numbers, after what thresholds and rejection need of all shards."""
    plan, needs = columns.tensors, columns.needs
    adjusts, is_rejection = bool(needs & Need.ADJUSTMENT), bool(needs & Need.REJECTION)
    if not needs & Need.DRAW:
        return verify_ops.verify_greedy(logits, vocab_start, plan, adjusts)
    if not columns.has_thresholds and not is_rejection:
        return verify_ops.verify_coupled(logits, vocab_start, plan, None, adjusts)
    drafts = (columns.draft_ids, columns.draft_probs)
    if group.size == 1:
        limits = (bool(needs & limit) for limit in (Need.MIN_P, Need.TOP_K, Need.TOP_P))
        return verify_ops.verify_unsharded(logits, vocab_start, plan, *drafts, adjusts, *limits)
    maxima = group.all_gather(verify_ops.verify_prepare(logits, vocab_start, plan)[:, 0].contiguous()).amax(0)
    state = _threshold(logits, vocab_start, columns, maxima, group) if columns.has_thresholds else None
    if is_rejection:
        return verify_ops.verify_rejection(logits, vocab_start, plan, maxima, state, *drafts)
    return verify_ops.verify_coupled(logits, vocab_start, plan, state, False)


def _threshold(logits: Tensor, vocab_start: int, columns: PlanColumns, maxima: Tensor, group: RankGroup) -> Tensor:
    """The lowest value that min-p, top-k and top-p keep, in this order, as the state of a finished search."""
    state = verify_ops.threshold_start(maxima, columns.tensors)
    rounds = [
        *(range(NUM_TOP_K_ROUNDS) if columns.needs & Need.TOP_K else ()),
        *(range(NUM_TOP_K_ROUNDS, 2 * NUM_TOP_K_ROUNDS) if columns.needs & Need.TOP_P else ()),
    ]
    for index in rounds:
        histogram = verify_ops.threshold_histogram(logits, vocab_start, columns.tensors, maxima, state, index)
        verify_ops.threshold_narrow(state, group.all_gather(histogram).sum(0), columns.tensors, index)
    return state


def to_verdict(outcome: Ints, commits: Ints, depth: int) -> Verdict:
    """Results of `launch` on the host, of a plan of this depth."""
    return Verdict(
        tokens=outcome[:, OutcomeColumn.TOKENS : OutcomeColumn.TOKENS + depth],
        accepted_rows=outcome[:, OutcomeColumn.TOKENS + depth :],
        num_tokens=commits[:, CommitColumn.NUM_TOKENS],
        num_accepted=outcome[:, OutcomeColumn.NUM_ACCEPTED],
        finishes=commits[:, CommitColumn.FINISH],
        kv_lens=commits[:, CommitColumn.KV_LEN],
        is_flagged=outcome[:, OutcomeColumn.IS_FLAGGED] != 0,
    )


def _add_logprobs(verdict: Verdict, raw: Tensor, vocab_start: int, columns: PlanColumns, group: RankGroup) -> None:
    """Log-softmax of the raw logits for the tokens kept, and the likeliest ones. Collective."""
    asking = (columns.num_logprobs != NO_LOGPROBS) & ~verdict.is_flagged
    is_kept = (np.arange(columns.depth) < verdict.num_tokens[:, None]) & asking[:, None]
    if not is_kept.any():
        return
    visited = np.concatenate((np.zeros_like(verdict.tokens[:, :1]), verdict.accepted_rows[:, :-1]), axis=1)
    rows = (visited + columns.first_rows[:, None])[is_kept]
    num_top = int(columns.num_logprobs[asking].max())
    at_rows = raw[torch.from_numpy(rows).to(raw.device)]
    verdict.logprobs = token_logprobs(at_rows, vocab_start, verdict.tokens[is_kept], num_top, group)
