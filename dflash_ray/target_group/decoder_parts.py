"""What the decoders of the families related to Llama consist of, read off the modules of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from dflash_ray.kernels import ops
from dflash_ray.models.target_logits import norm_weight
from dflash_ray.target_group.linears import is_linear
from dflash_ray.target_group.step import Ints

_FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Granite")
_EMBEDDINGS = ("Embedding", "GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding")
_FIRST_POSITIONS = 512  # that a table of turns has; doubled when it ends


@dataclass(frozen=True, slots=True)
class LayerParts:
    """This rank's weights of a layer; None where the family has none. Norms are float32.

    Attributes:
        qkv, gate_up: of queries, keys and values, and of gates and ups, one behind the other.
        after_attention_norm, after_mlp_norm: of the sublayers' outputs.
        window: 0 for all rows.
        group: whose ranks' outputs are added up; None for one rank.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    after_attention_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    after_mlp_norm: Tensor | None
    window: int
    group: Any

    def to(self, device: str) -> LayerParts:
        """The same on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if torch.is_tensor(value)})


def layer_parts(layer: Any) -> LayerParts:
    """Of a layer of a known family."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [part.bias for part in projections if part.bias is not None]
    # Gemma 2 has norms before and behind each sublayer, and names the one before the MLP otherwise.
    has_norms_after = hasattr(layer, "pre_feedforward_layernorm")
    return LayerParts(
        input_norm=norm_weight(layer.input_layernorm).detach(),
        qkv=torch.cat([part.weight.detach() for part in projections]),
        qkv_bias=torch.cat(biases).detach() if biases else None,
        q_norm=_norm(attention, "q_norm"),
        k_norm=_norm(attention, "k_norm"),
        output=attention.o_proj.weight.detach(),
        output_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
        after_attention_norm=_norm(layer, "post_attention_layernorm") if has_norms_after else None,
        mlp_norm=norm_weight(
            layer.pre_feedforward_layernorm if has_norms_after else layer.post_attention_layernorm
        ).detach(),
        gate_up=torch.cat((mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach())),
        down=mlp.down_proj.weight.detach(),
        after_mlp_norm=_norm(layer, "post_feedforward_layernorm") if has_norms_after else None,
        window=_window(attention),
        group=getattr(attention.o_proj, "mp_group", None),
    )


def decoder_shape(base: Any) -> ops.DecoderShape:
    """What its layers have in common; heads are this rank's."""
    first = base.layers[0]
    attention, norm = first.self_attn, first.input_layernorm
    return ops.DecoderShape(
        heads=attention.q_proj.weight.shape[0] // attention.head_dim,
        kv_heads=attention.k_proj.weight.shape[0] // attention.head_dim,
        head_dim=attention.head_dim,
        is_gelu=isinstance(first.mlp.act_fn, GELUTanh),
        eps=float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps),
        scale=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
        residual_scale=getattr(first, "residual_multiplier", 1.0),
    )


def embedding_scale(base: Any) -> float:
    """Gemma's embedding scales what it gives, Granite's decoder does."""
    scales = getattr(base, "embedding_multiplier", 1.0), getattr(base.embed_tokens, "embed_scale", 1.0)
    return math.prod(map(float, scales))


def obstacle(base: Any) -> str:
    """Why a decoder is not made of these parts; empty if it is."""
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


def _norm(module: Any, name: str) -> Tensor | None:
    norm = getattr(module, name, None)
    return None if norm is None else norm_weight(norm).detach()


def _window(attention: Any) -> int:
    """Mistral's attention reads its window from the configuration, others have their layer's own."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    is_mistral = type(attention).__name__ == "MistralAttention"
    return (attention.config.sliding_window or 0) if is_mistral else 0


class RotaryTable:
    """Cosines and sines by position, made once by the model's own module; of some kinds of it anew in every pass."""

    def __init__(self, rotary: Any, device: str = "cpu") -> None:
        self._rotary = rotary
        self._device = device
        # The others look at how far a batch reaches.
        self._lasts = getattr(rotary, "rope_type", "") in ("default", "linear", "llama3", "yarn")
        self._cos = self._sin = torch.zeros(0, 0)

    def __call__(self, positions: Ints) -> tuple[Tensor, Tensor]:
        """float32 [T, d] each on the device, for positions [T]."""
        if not self._lasts:
            cos, sin = self._turn(torch.from_numpy(positions))
            return cos.to(self._device), sin.to(self._device)
        needed = int(positions.max(initial=-1)) + 1
        if needed > len(self._cos):
            cos, sin = self._turn(torch.arange(max(needed, 2 * len(self._cos), _FIRST_POSITIONS)))
            self._cos, self._sin = cos.to(self._device), sin.to(self._device)
        if self._device == "cpu":  # lines are gathered by numpy: torch wakes its threads for a few of them
            return torch.from_numpy(self._cos.numpy()[positions]), torch.from_numpy(self._sin.numpy()[positions])
        at = torch.from_numpy(positions).to(self._device, non_blocking=True)
        return self._cos[at], self._sin[at]

    def whole(self, num_positions: int) -> tuple[Tensor, Tensor] | None:
        """float32 [P, d] each on the device, of all positions below P; None where turns look at the batch."""
        if not self._lasts:
            return None
        self(np.arange(num_positions))
        return self._cos[:num_positions], self._sin[:num_positions]

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(torch.empty(0), positions[None])
        return cos[0].contiguous(), sin[0].contiguous()
