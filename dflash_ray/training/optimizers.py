"""AdamW for all weights, or Muon for the matrices that map rows to rows and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dflash_ray.training.config import FitSection

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "momentum")  # of a parameter, in one of the optimisers
_ADAM_BETAS = (0.9, 0.95)
_MUON_MOMENTUM = 0.95
# Five steps of (a I + b G + c G^2) x, G = x x^T, bring singular values above 0.001 near 1 (Jordan et al., Muon, 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
# An orthogonal update times this and the root of the longer side is as large as AdamW's (arXiv 2502.16982, 2.2).
_RMS_OF_ADAMW = 0.2


def build_optimizers(section: FitSection, parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """The optimisers that fit.optimizer asks for; each parameter is in one of them."""
    matrices = {name: p for name, p in parameters.items() if section.optimizer == "muon" and _is_map(name, p)}
    rest = [parameter for name, parameter in parameters.items() if name not in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices.values(), section.learning_rate, section.weight_decay))
    if rest:
        optimizers.append(
            torch.optim.AdamW(rest, lr=section.learning_rate, betas=_ADAM_BETAS, weight_decay=section.weight_decay)
        )
    return optimizers


def _is_map(name: str, parameter: nn.Parameter) -> bool:
    """A codebook has two axes too, but its rows are looked up: most get no gradient, and none is part of a map."""
    return parameter.ndim == 2 and not name.endswith("_codebook")


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all brought near 1 before it is applied; for matrices alone.

    As torch.optim.Muon with its `match_rms_adamw`, but in float32, as most CPUs emulate products of bfloat16, and with
    the iteration on the shorter side's Gram matrix: for SmolLM2's layers less than two thirds of the operations.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step with the gradients of this moment; parameters without one stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].mul_(_MUON_MOMENTUM).add_(gradient)
        update = orthogonalised(gradient.add(momentum, alpha=_MUON_MOMENTUM))  # Nesterov's
        scale = _RMS_OF_ADAMW * max(parameter.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought to between 0.7 and 1.2, but for the smallest; same shape, float32.

    The iteration's factors are all polynomials of the Gram matrix, so they are multiplied first and applied once.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).float()
    x = x / x.norm().clamp(min=torch.finfo(torch.float32).tiny)
    a, b, c = _COEFFICIENTS
    gram: Tensor = x @ x.T
    product: Tensor = torch.eye(len(gram), device=gram.device)
    for iteration in range(_NUM_ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product if iteration else factor
        if iteration + 1 < _NUM_ITERATIONS:
            gram = factor @ gram @ factor
    result: Tensor = product @ x
    return result.T if is_tall else result
