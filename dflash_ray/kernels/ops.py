"""The operators, as the other packages call them: compiled where the library has them, plain torch elsewhere.

Shapes: T rows of a step in E entries, n_q and n_kv heads of size d.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, auto

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
    parents: Tensor | None = None,
) -> Tensor:
    """Stores a step's keys and values, then attends: a row sees its entry's context and the entry's rows up to itself.

    Without `is_causal` it sees all rows of its entry. In a tree it sees of its entry's rows its ancestors and itself,
    with the result that it has in a chain of these.

    Args:
        query: [T, n_q, d]; key, value: [T, n_kv, d], all rotated.
        key_cache, value_cache: [num_pages * page_size, n_kv, d]; written at slots int64 [T].
        entry_lens, context_lens, page_counts: int64 [E] on the host; pages: int64, the entries' page tables in a row.
        window: a row sees rows at a distance below it; 0 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        parents: int64 [T] on the host, the row of its entry that each row follows, -1 for an entry's first; a parent
            comes before its children. None or empty: each follows the one before it.

    Returns:
        [T, n_q, d].
    """
    implementation = torch.ops.dflash_ray.paged_attention if is_compiled_for(query) else reference.paged_attention
    out: Tensor = implementation(
        query, key, value, key_cache, value_cache, slots, entry_lens, context_lens, page_counts, pages,
        page_size, scale, window, softcap, is_causal, parents,
    )  # fmt: skip
    return out


def move_rows(caches: list[Tensor], source: Tensor, target: Tensor) -> None:
    """Copies rows source [n] of every cache [rows, ...] to rows target [n], int64 on the host, in this order.

    Later rows are read after earlier ones were written, so a target must not be among the sources behind it.
    """
    if is_compiled_for(caches[0]):
        torch.ops.dflash_ray.move_rows(caches, source, target)
    else:
        reference.move_rows(caches, source, target)


class DecoderWeight(IntEnum):
    """A decoder layer's weights in the order of the operators; empty tensors where a family has none.

    QKV, OUTPUT, GATE, UP, DOWN and the convolutions' projections are packed; norms, biases and the convolutions' bases
    [2, taps, H] are float32.
    """

    INPUT_NORM = 0
    QKV = auto()
    QKV_BIAS = auto()
    Q_NORM = auto()
    K_NORM = auto()
    OUTPUT = auto()
    OUTPUT_BIAS = auto()
    AFTER_ATTENTION_NORM = auto()
    MLP_NORM = auto()
    GATE = auto()
    UP = auto()
    DOWN = auto()
    AFTER_MLP_NORM = auto()
    ATTENTION_CONV = auto()
    ATTENTION_CONV_BASE = auto()
    MLP_CONV = auto()
    MLP_CONV_BASE = auto()


def decoder_weights(weights: Mapping[DecoderWeight, Tensor | None]) -> list[Tensor]:
    """A layer's weights as the operators take them, of those that its family has."""
    found = (weights.get(place) for place in DecoderWeight)
    return [torch.empty(0) if weight is None else weight for weight in found]


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What all layers of a decoder have in common; heads are this rank's.

    Attributes:
        scale: of attention scores; softcap: as in `paged_attention`.
        residual_scale: what a sublayer's output is multiplied by before it is added.
        is_gelu: the MLP's activation is GELU in its tanh form, else SiLU.
        taps, group: of the convolutions along a block, and how many channels share what depends on the slot.
    """

    heads: int
    kv_heads: int
    head_dim: int
    is_gelu: bool
    eps: float
    scale: float
    softcap: float = 0.0
    residual_scale: float = 1.0
    taps: int = 0
    group: int = 0

    def arguments(self, page_size: int = 1, block: int = 0) -> tuple[list[int], list[float]]:
        sizes = [self.heads, self.kv_heads, self.head_dim, page_size, int(self.is_gelu), block, self.taps, self.group]
        return sizes, [self.eps, self.scale, self.softcap, self.residual_scale]


def decoder_layers(
    hidden: Tensor,
    weights: list[list[Tensor]],
    keys: list[Tensor],
    values: list[Tensor],
    step: list[Tensor],
    shape: DecoderShape,
    page_size: int,
    windows: list[int],
    is_causal: list[bool] | None = None,
    block: int = 0,
) -> None:
    """Runs rows [T, H] through whole layers, in place; compiled only.

    Args:
        weights: of each layer, by DecoderWeight.
        keys, values: each layer's cache, written at the step's slots.
        step: cos and sin [T, d], then slots, entry_lens, context_lens, page_counts, pages and parents (or an empty
            tensor) of `paged_attention`.
        windows: each layer's.
        is_causal: of each layer; None: all are.
        block: rows that belong together, for convolutions.
    """
    causal = [1] * len(windows) if is_causal is None else [int(flag) for flag in is_causal]
    flat = [weight for layer in weights for weight in layer]
    arguments = shape.arguments(page_size, block)
    torch.ops.dflash_ray.decoder_layers(hidden, flat, keys, values, step, *arguments, windows, causal)


def decoder_attention(
    hidden: Tensor,
    weights: list[Tensor],
    keys: Tensor,
    values: Tensor,
    step: list[Tensor],
    shape: DecoderShape,
    page_size: int,
    window: int,
) -> Tensor:
    """This rank's part [T, H] of one layer's attention output, without bias and norm."""
    out: Tensor = torch.ops.dflash_ray.decoder_attention(
        hidden, weights, keys, values, step, *shape.arguments(page_size), window
    )
    return out


def decoder_mlp(hidden: Tensor, weights: list[Tensor], shape: DecoderShape) -> Tensor:
    """This rank's part [T, H] of one layer's MLP output, without norm."""
    out: Tensor = torch.ops.dflash_ray.decoder_mlp(hidden, weights, *shape.arguments())
    return out
