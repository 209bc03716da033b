"""The decoder layers of the families related to Llama as few operators, each of which walks many layers.

After sharding, a layer's weights are packed and its modules dropped. With one rank, all layers between two taps are one
operator; with more, a layer is two, for each ends in a sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dflash_ray.core.memory import return_freed_memory
from dflash_ray.kernels import ops
from dflash_ray.models.packed_linear import PackedLinear
from dflash_ray.models.target_logits import norm_weight
from dflash_ray.target_group.attention import PagedStep
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.decoder_parts import LayerParts, RotaryTable, decoder_shape, embedding_scale, layer_parts
from dflash_ray.target_group.linears import summed_over_ranks


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights in the order of `ops.decoder_layers`, its window, and what is left to do where ranks add up."""

    weights: list[Tensor]
    window: int
    group: Any
    output_bias: Tensor | None

    @property
    def norms_after(self) -> tuple[Tensor, Tensor]:
        """Of the attention's and the MLP's outputs; empty where the family has none."""
        return self.weights[ops.DecoderWeight.AFTER_ATTENTION_NORM], self.weights[ops.DecoderWeight.AFTER_MLP_NORM]


class LeanDecoder:
    """Embedding, layers and final norm of one rank. Takes the layers' weights over and leaves the modules empty.

    Args:
        tap_layer_ids: layers whose outputs are wanted, in order of concatenation.
    """

    def __init__(self, base: Any, tp_size: int, tap_layer_ids: Sequence[int]) -> None:
        self._shape = decoder_shape(base)
        self._is_alone = tp_size == 1
        self._embedding = base.embed_tokens.weight.detach().numpy()
        self._turns = RotaryTable(base.rotary_emb)
        self._embedding_scale = embedding_scale(base)
        self._norm = norm_weight(base.norm).detach()
        self._layers = []
        for index in range(len(base.layers)):
            self._layers.append(_pack(layer_parts(base.layers[index]), self._is_alone))
            base.layers[index] = nn.Identity()
            return_freed_memory()  # or loading would take the layers' memory twice
        self._tap_layer_ids = list(tap_layer_ids)
        ends = sorted({0, len(self._layers), *(index + 1 for index in tap_layer_ids)})
        self._stretches = list(pairwise(ends))
        self._whole = [(0, len(self._layers))]

    def __call__(self, batch: StepBatch, step: PagedStep) -> tuple[Tensor, Tensor | None]:
        """Normed rows [T, H], and the taps [F, taps * H] of the feature rows if there are any."""
        # Lines are gathered by numpy: torch wakes its threads for a few of them.
        hidden = torch.from_numpy(self._embedding[batch.token_ids])
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        tensors = [*self._turns(batch.positions), step.slots, *step.tables]
        width = hidden.shape[1]
        taps = np.empty((len(batch.feature_rows), len(self._tap_layer_ids) * width), dtype=np.float32)
        for begin, end in self._stretches if len(taps) else self._whole:
            self._run(hidden, begin, end, step, tensors)
            for place, layer in enumerate(self._tap_layer_ids if len(taps) else ()):
                if layer == end - 1:
                    taps[:, place * width : (place + 1) * width] = hidden.numpy()[batch.feature_rows]
        return ops.rms_norm(hidden, self._norm, self._shape.eps), torch.from_numpy(taps) if taps.size else None

    def _run(self, hidden: Tensor, begin: int, end: int, step: PagedStep, tensors: list[Tensor]) -> None:
        """Layers begin, ..., end - 1, in place."""
        layers, cache = self._layers[begin:end], step.cache
        if self._is_alone:
            ops.decoder_layers(
                hidden, [layer.weights for layer in layers], cache.keys[begin:end], cache.values[begin:end], tensors,
                self._shape, cache.page_size, [layer.window for layer in layers],
            )  # fmt: skip
            return
        for index, layer in enumerate(layers, start=begin):
            pages = (cache.keys[index], cache.values[index])
            out = ops.decoder_attention(
                hidden, layer.weights, *pages, tensors, self._shape, cache.page_size, layer.window
            )
            self._add(hidden, summed_over_ranks(out, layer.group), layer.output_bias, layer.norms_after[0])
            out = ops.decoder_mlp(hidden, layer.weights, self._shape)
            self._add(hidden, summed_over_ranks(out, layer.group), None, layer.norms_after[1])

    def _add(self, hidden: Tensor, out: Tensor, bias: Tensor | None, norm: Tensor) -> None:
        if bias is not None:
            out = out + bias
        if len(norm):
            out = ops.rms_norm(out, norm, self._shape.eps)
        hidden.add_(out, alpha=self._shape.residual_scale)


def _pack(parts: LayerParts, is_alone: bool) -> _Layer:
    gate, up = parts.gate_up.chunk(2)
    place = ops.DecoderWeight
    weights = ops.decoder_weights(
        {
            place.INPUT_NORM: parts.input_norm,
            place.QKV: _packed(parts.qkv),
            place.QKV_BIAS: parts.qkv_bias,
            place.Q_NORM: parts.q_norm,
            place.K_NORM: parts.k_norm,
            place.OUTPUT: _packed(parts.output),
            place.OUTPUT_BIAS: parts.output_bias if is_alone else None,
            place.AFTER_ATTENTION_NORM: parts.after_attention_norm,
            place.MLP_NORM: parts.mlp_norm,
            place.GATE: _packed(gate),
            place.UP: _packed(up),
            place.DOWN: _packed(parts.down),
            place.AFTER_MLP_NORM: parts.after_mlp_norm,
        }
    )
    return _Layer(weights, parts.window, parts.group, parts.output_bias)


def _packed(weight: Tensor) -> Tensor:
    return PackedLinear(weight).weight
