"""How a drafter's candidates are chosen: compiled where the library has it, elsewhere as reference_drafts.py has it.

Shapes: R rows of V tokens; N blocks of S slots with k candidates each. Nothing waits for the device.
"""

from __future__ import annotations

from typing import cast

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
