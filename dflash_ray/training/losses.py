"""What the error of a draft slot costs.

Slots are the B - 1 positions after the anchor; IGNORE marks those without a label.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
_SMOOTHING = 0.5  # arXiv 2605.18810: the least chance that a slot is taken to pass


def decay_weights(valid: Tensor, decay: float) -> Tensor:
    """exp(-(k - 1) / decay) for slot k (DFlash paper, eq. 4); valid bool [..., B-1], weights float32 of that shape."""
    slots = torch.arange(valid.shape[-1], device=valid.device)
    return torch.exp(-slots / decay) * valid


def dpace_weights(losses: Tensor, valid: Tensor, smoothing: float = _SMOOTHING) -> Tensor:
    """D-PACE (arXiv 2605.18810): a slot weighs what the walk through it still has to gain.

    With pass chances c_i = (1 - s) exp(-loss_i) + s and reach P_m = c_1 ... c_m, the weight of slot j is the sum of
    P_m over valid m >= j. A slot without a label cannot pass: its token is not in the draft vocabulary.

    Args:
        losses: cross-entropies float32 [..., B-1]; no gradient flows through them.
        valid: bool of the same shape.
    """
    chances = (1 - smoothing) * torch.exp(-losses.detach()) * valid + smoothing
    reach = torch.cumprod(chances, dim=-1) * valid
    return reach.flip(-1).cumsum(-1).flip(-1) * valid


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each slot, float32 [..., B-1]; 0 where the label is IGNORE. logits [..., B-1, V]."""
    flat = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(labels.shape)


def divergences(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Forward KL divergence of each slot from the target's distribution over the draft vocabulary, float32."""
    target = F.log_softmax(target_logits.float(), dim=-1)
    draft = F.log_softmax(logits.float(), dim=-1)
    return (target.exp() * (target - draft)).sum(-1)
