"""The decoder layers of the families related to Llama as few operators, each of which walks many layers.

After sharding, a layer's weights are packed and its modules dropped. With one rank, all layers between two taps are one
operator; with more, a layer is two, for each ends in a sum over the ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from dflash_ray.core.memory import return_freed_memory
from dflash_ray.kernels import ops
from dflash_ray.models.packed_linear import PackedLinear
from dflash_ray.models.target_logits import norm_weight
from dflash_ray.target_group.attention import PagedStep
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.linears import is_linear, summed_over_ranks
from dflash_ray.target_group.step import Ints

logger = logging.getLogger(__name__)

_FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Granite")
_EMBEDDINGS = ("Embedding", "GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding")
_NONE = torch.empty(0)
_FIRST_POSITIONS = 512  # that a table of turns has; doubled when it ends


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


class RotaryTable:
    """Cosines and sines by position, made once by the model's own module; of some kinds of it anew in every pass."""

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        # The others look at how far a batch reaches.
        self._lasts = getattr(rotary, "rope_type", "") in ("default", "linear", "llama3", "yarn")
        self._cos = self._sin = np.zeros((0, 0), dtype=np.float32)

    def __call__(self, positions: Ints) -> tuple[Tensor, Tensor]:
        """float32 [T, d] each, for positions [T]."""
        if not self._lasts:
            return self._turn(torch.from_numpy(positions))
        needed = int(positions.max(initial=-1)) + 1
        if needed > len(self._cos):
            cos, sin = self._turn(torch.arange(max(needed, 2 * len(self._cos), _FIRST_POSITIONS)))
            self._cos, self._sin = cos.numpy(), sin.numpy()
        return torch.from_numpy(self._cos[positions]), torch.from_numpy(self._sin[positions])

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(torch.empty(0), positions[None])
        return cos[0].contiguous(), sin[0].contiguous()


class LeanDecoder:
    """Embedding, layers and final norm of one rank. Takes the layers' weights over and leaves the modules empty.

    Args:
        tap_layer_ids: layers whose outputs are wanted, in order of concatenation.
    """

    def __init__(self, base: Any, tp_size: int, tap_layer_ids: Sequence[int]) -> None:
        attention, mlp, first = base.layers[0].self_attn, base.layers[0].mlp, base.layers[0]
        self._shape = ops.DecoderShape(
            heads=attention.q_proj.weight.shape[0] // attention.head_dim,
            kv_heads=attention.k_proj.weight.shape[0] // attention.head_dim,
            head_dim=attention.head_dim,
            is_gelu=isinstance(mlp.act_fn, GELUTanh),
            eps=_eps(first.input_layernorm),
            scale=attention.scaling,
            softcap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
            residual_scale=getattr(first, "residual_multiplier", 1.0),
        )
        del attention, mlp, first
        self._is_alone = tp_size == 1
        self._embedding = base.embed_tokens.weight.detach().numpy()
        self._turns = RotaryTable(base.rotary_emb)
        # Gemma's embedding scales what it gives, Granite's decoder does.
        scales = getattr(base, "embedding_multiplier", 1.0), getattr(base.embed_tokens, "embed_scale", 1.0)
        self._embedding_scale = math.prod(map(float, scales))
        self._norm = norm_weight(base.norm).detach()
        self._layers = []
        for index in range(len(base.layers)):
            self._layers.append(_pack(base.layers[index], self._is_alone))
            base.layers[index] = nn.Identity()
            return_freed_memory()  # or loading would take the layers' memory twice
        self._tap_layer_ids = list(tap_layer_ids)
        ends = sorted({0, len(self._layers), *(index + 1 for index in tap_layer_ids)})
        self._stretches = list(pairwise(ends))

    def __call__(self, batch: StepBatch, step: PagedStep) -> tuple[Tensor, Tensor | None]:
        """Normed rows [T, H], and the taps [F, taps * H] of the feature rows if there are any."""
        # Lines are gathered by numpy: torch wakes its threads for a few of them.
        hidden = torch.from_numpy(self._embedding[batch.token_ids])
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        tensors = [*self._turns(batch.positions), step.slots, *step.tables]
        width = hidden.shape[1]
        taps = np.empty((len(batch.feature_rows), len(self._tap_layer_ids) * width), dtype=np.float32)
        for begin, end in self._stretches:
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


def is_lean(base: Any, device: str) -> bool:
    """Whether LeanDecoder computes what this decoder does; says so in the log where it does not."""
    if device != "cpu" or not ops.is_compiled_for(base.embed_tokens.weight):
        return False
    reason = _obstacle(base)
    if reason:
        logger.info("decoder layers run as transformers has them, which is slower: %s", reason)
    return not reason


def _obstacle(base: Any) -> str:
    layer = base.layers[0]
    name = type(layer).__name__
    if name not in {f"{family}DecoderLayer" for family in _FAMILIES}:
        return f"{name} is not of a known family"
    attention, mlp = layer.self_attn, layer.mlp
    if not isinstance(mlp.act_fn, nn.SiLU | SiLUActivation | GELUTanh):
        return f"its activation is {type(mlp.act_fn).__name__}"
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    if not all(map(is_linear, [*projections, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj])):
        return "its projections are not plain linear layers"
    if any(part.bias is not None for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        return "its MLP has biases"
    if len({part.bias is None for part in projections}) > 1:
        return "some of its projections have a bias"
    embedding = type(base.embed_tokens).__name__
    if embedding not in _EMBEDDINGS:
        return f"its embedding is {embedding}"
    if 2 * base.rotary_emb.inv_freq.shape[-1] != attention.head_dim:
        return "it rotates a part of each head"
    return ""


def _pack(layer: Any, is_alone: bool) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [part.bias for part in projections if part.bias is not None]
    # Gemma 2 has norms before and behind each sublayer, and names the one before the MLP otherwise.
    has_norms_after = hasattr(layer, "pre_feedforward_layernorm")
    weights = [_NONE] * len(ops.DecoderWeight)
    place = ops.DecoderWeight
    weights[place.INPUT_NORM] = _norm(layer, "input_layernorm")
    weights[place.QKV] = _packed(*projections)
    weights[place.QKV_BIAS] = torch.cat(biases).detach() if biases else _NONE
    weights[place.Q_NORM], weights[place.K_NORM] = _norm(attention, "q_norm"), _norm(attention, "k_norm")
    weights[place.OUTPUT] = _packed(attention.o_proj)
    output_bias = None if attention.o_proj.bias is None else attention.o_proj.bias.detach()
    weights[place.OUTPUT_BIAS] = output_bias if is_alone and output_bias is not None else _NONE
    weights[place.MLP_NORM] = _norm(
        layer, "pre_feedforward_layernorm" if has_norms_after else "post_attention_layernorm"
    )
    if has_norms_after:
        weights[place.AFTER_ATTENTION_NORM] = _norm(layer, "post_attention_layernorm")
        weights[place.AFTER_MLP_NORM] = _norm(layer, "post_feedforward_layernorm")
    weights[place.GATE], weights[place.UP] = _packed(mlp.gate_proj), _packed(mlp.up_proj)
    weights[place.DOWN] = _packed(mlp.down_proj)
    return _Layer(weights, _window(attention), getattr(attention.o_proj, "mp_group", None), output_bias)


def _packed(*linears: Any) -> Tensor:
    weights = [linear.weight.detach() for linear in linears]
    return PackedLinear(weights[0] if len(weights) == 1 else torch.cat(weights)).weight


def _norm(module: Any, name: str) -> Tensor:
    norm = getattr(module, name, None)
    return _NONE if norm is None else norm_weight(norm).detach()


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _window(attention: Any) -> int:
    """Mistral's attention reads its window from the configuration, others have their layer's own."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    is_mistral = type(attention).__name__ == "MistralAttention"
    return (attention.config.sliding_window or 0) if is_mistral else 0
