"""How a target makes logits of its last layer's output: its final norm, and what it does with the head's products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_ray.models.target_checkpoint import TargetCheckpoint

_LARGE = 1024.0  # beside which a norm's epsilon is nothing


def logit_factor(config: Any) -> float:
    """What the head's products are multiplied by: Cohere's logit_scale, one over Granite's logits_scaling, or 1."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)


def soft_cap(config: Any) -> float:
    """The bound c of c tanh(logit / c) that Gemma 2 ends with; 0 where there is none."""
    return float(getattr(config, "final_logit_softcapping", None) or 0.0)


def embedding_scale(target: TargetCheckpoint) -> float:
    """What a target multiplies the rows of its embedding by: Gemma the root of their size, Granite a setting."""
    scale = getattr(target.skeleton().get_input_embeddings(), "scalar_embed_scale", 1.0)
    return float(scale) * float(getattr(target.config, "embedding_multiplier", None) or 1.0)


def norm_weight(norm: nn.Module) -> Tensor:
    """What an RMS norm multiplies unit rows by, [H]: its weight, or 1 + weight as Gemma stores it.

    Raises ValueError for another kind of norm.
    """
    weight: Tensor = norm.weight
    rows = torch.full((2, weight.shape[0]), _LARGE, dtype=torch.float32)
    rows[1] *= -1
    with torch.no_grad():
        up, down = norm(rows)
    if not torch.equal(up, -down) or (not up.any() and weight.any()):
        raise ValueError(f"{type(norm).__name__} is no norm over the root mean square")
    return up


class TargetLogits(nn.Module):
    """Frozen; float32 rows [..., H] of the last layer to logits [..., V] over the rows of a head [V, H]."""

    def __init__(self, target: TargetCheckpoint) -> None:
        super().__init__()
        self.norm = _final_norm(target).requires_grad_(False)
        self._factor, self._cap = logit_factor(target.config), soft_cap(target.config)

    def forward(self, last_hidden: Tensor, head: Tensor) -> Tensor:
        logits = F.linear(self.norm(last_hidden), head).float() * self._factor
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits


def _final_norm(target: TargetCheckpoint) -> nn.Module:
    """Raises ValueError for a norm that has more than a weight."""
    if target.gguf_file is not None:  # such files hold some norms as 1 + weight, which transformers undoes
        loaded: nn.Module = target.load_model().get_decoder().norm
        return loaded
    norm: nn.Module = target.skeleton().get_decoder().norm.float().to_empty(device="cpu")
    names = list(norm.state_dict())
    if names != ["weight"]:
        raise ValueError(f"fit.distillation_weight: the target's last norm has {names}, and only a weight is known")
    norm.load_state_dict({"weight": target.load_final_norm()})
    return norm
