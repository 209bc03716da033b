"""How a drafter's candidates are chosen: compiled where the library has it, elsewhere as reference_drafts.py has it.

Shapes: R rows of V tokens; N blocks of S slots with k candidates each. Nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from dflash_ray.kernels import build, reference_drafts

_operators = torch.ops.dflash_ray
MOST_CANDIDATES = 256  # of a slot


def _is_compiled_for(x: Tensor) -> bool:
    return build.is_loaded_for(x.device.type)


def top_candidates(logits: Tensor, count: int) -> Tensor:
    """Ids int64 [R, count] of the largest logits float32 [R, V], ascending; of equal logits the lower ids.

    NaN is lowest. At most MOST_CANDIDATES, and no more than there are tokens.
    """
    if _is_compiled_for(logits):
        out: Tensor = _operators.top_candidates(logits.contiguous(), count)
        return out
    return reference_drafts.top_candidates(logits, count)


def walk_candidates(
    scores: Tensor, ids: Tensor, inverse_temperatures: Tensor, seeds: Tensor, firsts: Tensor
) -> tuple[Tensor, Tensor]:
    """Chooses a candidate for each slot in turn, given the choice before it.

    The greedy choice is the best score; of equal ones the lower id's. Above temperature 0 it is a draw from
    softmax(score / temperature), with the noise that the target will draw this position's token with.

    Args:
        scores: float32 [N, S, k, k]; the third index is the candidate of the slot before, 0 in the first slot.
        ids: int64 [N, S, k], ascending, of the target's vocabulary.
        inverse_temperatures: float64 [N], 0 for greedy ones; seeds: int64 [N], the bits of unsigned numbers.
        firsts: int64 [N], positions of the first slots' tokens.

    Returns:
        Of each slot all candidates, int64 [N, S, k], the chosen one first and the others by falling score, and their
        log-probabilities float32 [N, S, k], without the noise.
    """
    if _is_compiled_for(scores):
        return cast(
            tuple[Tensor, Tensor],
            _operators.walk_candidates(scores.contiguous(), ids.contiguous(), inverse_temperatures, seeds, firsts),
        )
    return reference_drafts.walk_candidates(scores, ids, inverse_temperatures, seeds, firsts)


class ChoiceWeights(NamedTuple):
    """What `choose_drafts` chooses with.

    Attributes:
        norm: float32 [H]; head: packed [V, H]; projection: packed [r, H].
        predecessors, successors: float32 [V, r], the selector's codebooks.
        ids: int64 [V], ascending, of the target's vocabulary; empty where the head is the target's own.
    """

    norm: Tensor
    head: Tensor
    projection: Tensor
    predecessors: Tensor
    successors: Tensor
    ids: Tensor


def choose_drafts(
    rows: Tensor,
    weights: ChoiceWeights,
    anchors: Tensor,
    inverse_temperatures: Tensor,
    seeds: Tensor,
    firsts: Tensor,
    block: int,
    num_slots: int,
    num_candidates: int,
    eps: float,
    multiplier: float,
    softcap: float,
    wants_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Final norm, head, `top_candidates`, a selector's scores and `walk_candidates` in one; compiled for CPUs only.

    On a GPU they are operators of one graph (models/draft_choice.py, which says it in torch).

    Args:
        rows: float32 [N * block, H], of which the first `num_slots` behind each block's anchor are chosen for.
        anchors: int64 [N], of the target's vocabulary; the other columns are those of `walk_candidates`.
        multiplier, softcap: of logits; a softcap of 0 is none.

    Returns:
        What `walk_candidates` returns, then the candidates int64 [N, S, k] as it gets them, and their scores float32
        [N, S, k, k], which are empty unless they are wanted.
    """
    sizes, scalars = [block, num_slots, num_candidates], [eps, multiplier, softcap]
    return cast(
        tuple[Tensor, Tensor, Tensor, Tensor],
        _operators.choose_drafts(
            rows, list(weights), anchors, inverse_temperatures, seeds, firsts, sizes, scalars, wants_scores
        ),
    )


def store_context(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norms: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
) -> None:
    """Stores the context rows of features float32 [n, H] of all layers; compiled for CPUs only.

    On a GPU it is a graph of torch's operators (models/context_passes.py).

    Args:
        weight: packed [layers * 2 * n_kv * d, H], each layer's keys before its values; bias: as long, or None.
        norms: float32 [layers, ..., d], of keys; cos, sin: float32 [P, d].
        positions, rows: int64 [n]; rows of the pools keys and values float32 [layers, R, n_kv, d].
    """
    _operators.store_context(features, weight, bias, norms, cos, sin, positions, rows, keys, values, eps)
