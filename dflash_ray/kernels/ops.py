"""The operators, as the other packages call them: compiled where the library has them, plain torch elsewhere.

Shapes: T rows of a step in E entries, n_q and n_kv heads of size d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_ray.kernels import build, reference


def is_compiled_for(x: Tensor) -> bool:
    """Whether the compiled operators take tensors like this one."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and build.is_loaded_for("cpu")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] / sqrt(mean(x^2) + eps) in float32, times weight [n]."""
    if is_compiled_for(x):
        return torch.ops.dflash_ray.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[..., 2n] to [..., n]: silu of the first half times the second."""
    if is_compiled_for(gate_up):
        return torch.ops.dflash_ray.silu_and_mul(gate_up)
    return reference.silu_and_mul(gate_up)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    entry_lens: Tensor,
    context_lens: Tensor,
    page_counts: Tensor,
    pages: Tensor,
    page_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    is_causal: bool = True,
) -> Tensor:
    """Stores a step's keys and values, then attends: a row sees its entry's context and the entry's rows up to itself.

    Without `is_causal` it sees all rows of its entry.

    Args:
        query: [T, n_q, d]; key, value: [T, n_kv, d], all rotated.
        key_cache, value_cache: [num_pages * page_size, n_kv, d]; written at slots int64 [T].
        entry_lens, context_lens, page_counts: int64 [E] on the host; pages: int64, the entries' page tables in a row.
        window: a row sees rows at a distance below it; 0 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.

    Returns:
        [T, n_q, d].
    """
    implementation = torch.ops.dflash_ray.paged_attention if is_compiled_for(query) else reference.paged_attention
    out: Tensor = implementation(
        query, key, value, key_cache, value_cache, slots, entry_lens, context_lens, page_counts, pages,
        page_size, scale, window, softcap, is_causal,
    )  # fmt: skip
    return out
