"""What stands between the products of a decoder layer, on devices where a layer is several operators.

CUDA has them compiled; elsewhere, and where they could not be compiled, they are plain torch. Rows [T, n] are of the
model's type, norms and turns float32; values are rounded where they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_ray.kernels import build

_operators = torch.ops.dflash_ray


def _is_compiled_for(rows: Tensor) -> bool:
    return rows.device.type == "cuda" and build.is_loaded_for("cuda")


def add_norm(
    hidden: Tensor, delta: Tensor | None, after: Tensor | None, weight: Tensor, eps: float, scale: float
) -> Tensor:
    """Adds scale * delta to hidden [T, H] in place, and returns it over its root mean square, times weight [H].

    Args:
        delta: [T, H], or None where there is nothing to add.
        after: [H], of the norm of what is added, or None.
    """
    if _is_compiled_for(hidden):
        return _operators.add_norm(hidden, delta, after, weight, eps, scale)
    if delta is not None:
        added = delta.float() if after is None else _normed(delta, after, eps).float()
        hidden.copy_(hidden.float() + scale * added)
    return _normed(hidden, weight, eps)


def _normed(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(rows.float(), (rows.shape[-1],), None, eps) * weight).to(rows.dtype)


def turn_and_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
) -> None:
    """Norms (where the family does so) and rotates q and k; q stays in its place, k and v go to the caches.

    Args:
        qkv: [T, (n_q + 2 n_kv) d], overwritten.
        q_norm, k_norm: [d] each, or None.
        cos, sin: [T, d].
        slots: int64 [T], rows of the caches [rows, n_kv, d].
    """
    if _is_compiled_for(qkv):
        _operators.turn_and_store(qkv, q_norm, k_norm, cos, sin, slots, keys, values, eps)
        return
    kv_heads, head_dim = keys.shape[1:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    turned = heads[:, :-kv_heads].float()
    if q_norm is not None and k_norm is not None:
        norms = torch.stack([q_norm] * (turned.shape[1] - kv_heads) + [k_norm] * kv_heads)
        turned = F.rms_norm(turned, (head_dim,), None, eps) * norms
    left, right = turned.chunk(2, dim=-1)
    turned = (turned * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]).to(qkv.dtype)
    heads[:, : turned.shape[1] - kv_heads] = turned[:, :-kv_heads]
    keys.index_copy_(0, slots, turned[:, -kv_heads:])
    values.index_copy_(0, slots, heads[:, -kv_heads:])


def activate(gate_up: Tensor, is_gelu: bool) -> Tensor:
    """[T, 2n] to [T, n]: SiLU, or GELU in its tanh form, of the first half times the second."""
    if _is_compiled_for(gate_up):
        return _operators.activate(gate_up, is_gelu)
    gate, up = gate_up.float().chunk(2, dim=-1)
    activated = (F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)).to(gate_up.dtype)
    return (activated.float() * up).to(gate_up.dtype)


def convolve(x: Tensor, coefficients: Tensor, base: Tensor, side: int, block: int) -> Tensor:
    """Rows [T, H] of blocks of `block`, each with those of its block before it, times their taps' coefficients.

    Args:
        coefficients: [T, 2 * taps * groups], of the channels' groups; base: float32 [2, taps, H], added to them.
        side: 0 before a sublayer, 1 after it.
    """
    if _is_compiled_for(x):
        out: Tensor = _operators.convolve(x, coefficients, base, side, block)
        return out
    taps, width = base.shape[1:]
    shared = coefficients.view(len(x), 2, taps, -1)[:, side].float()
    kernel = base[side] + shared.repeat_interleave(width // shared.shape[-1], dim=-1)  # [T, taps, H]
    rows = x.float().view(-1, block, width)
    summed = torch.zeros_like(rows)
    for tap in range(min(taps, block)):
        summed[:, tap:] += kernel.view(-1, block, taps, width)[:, tap:, tap] * rows[:, : block - tap]
    return summed.flatten(0, 1).to(x.dtype)
