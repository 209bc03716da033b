"""A drafter's layers over context pages: one operator for all of them on CPU, few for each elsewhere.

The network is the one of dflash.py with its weights fused, and packed on CPU. Inference only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from dflash_ray.kernels import layer_ops, ops
from dflash_ray.kernels.attention import StepAttention, StepTables, plan
from dflash_ray.models.context_pages import PAGE_SIZE, BlockPlaces, ContextPages
from dflash_ray.models.dflash import DflashLayer, DflashNetwork
from dflash_ray.models.dflash2 import GroupedDynamicCausalConv
from dflash_ray.models.packed_linear import PackedLinear, fuse

Rows = Callable[[Tensor], Tensor]
Around = Callable[[Tensor, Rows], Tensor]

_NONE = torch.empty(0)


def draft_layers(network: DflashNetwork) -> CompiledLayers | DeviceLayers:
    """The layers as the device computes them soonest."""
    is_compiled = ops.is_compiled_for(network.norm.weight)
    return CompiledLayers(network) if is_compiled else DeviceLayers(network)


class CompiledLayers:
    """One operator from the first layer to the last, without the final norm."""

    def __init__(self, network: DflashNetwork) -> None:
        config = network.config
        conv = config.dflash2
        self._shape = ops.DecoderShape(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, False, config.rms_norm_eps,
            config.head_dim**-0.5, taps=conv.conv_kernel_size if conv else 0, group=conv.conv_group_size if conv else 0,
        )  # fmt: skip
        self._weights = [_weights(layer) for layer in network.layers]
        self._windows = [window or 0 for window in config.windows]
        self._is_causal = list(config.is_causal)

    def __call__(self, rows: Tensor, cos: Tensor, sin: Tensor, pages: ContextPages, places: BlockPlaces) -> None:
        """Takes rows [N * B, H] of N blocks through the layers, in place; positions turn by cos and sin [N * B, d]."""
        keys, values = pages.by_layer
        ops.decoder_layers(
            rows, self._weights, keys, values, [cos, sin, *places, _NONE], self._shape, PAGE_SIZE, self._windows,
            self._is_causal, len(rows) // len(places.entry_lens),
        )  # fmt: skip


def _weights(layer: DflashLayer) -> list[Tensor]:
    attention, mlp, place = layer.self_attn, layer.mlp, ops.DecoderWeight
    qkv = fuse((attention.q_proj, attention.k_proj, attention.v_proj))
    output = fuse((attention.o_proj,))
    weights = {
        place.INPUT_NORM: layer.input_layernorm.weight.detach(),
        place.QKV: qkv.weight,
        place.QKV_BIAS: qkv.bias,
        place.Q_NORM: attention.q_norm.weight.detach(),
        place.K_NORM: attention.k_norm.weight.detach(),
        place.OUTPUT: output.weight,
        place.OUTPUT_BIAS: output.bias,
        place.MLP_NORM: layer.post_attention_layernorm.weight.detach(),
        place.GATE: fuse((mlp.gate_proj,)).weight,
        place.UP: fuse((mlp.up_proj,)).weight,
        place.DOWN: fuse((mlp.down_proj,)).weight,
    }
    if hasattr(layer, "attention_conv"):
        weights[place.ATTENTION_CONV] = _projection(layer.attention_conv).weight
        weights[place.ATTENTION_CONV_BASE] = layer.attention_conv.base_kernel.detach()
        weights[place.MLP_CONV] = _projection(layer.mlp_conv).weight
        weights[place.MLP_CONV_BASE] = layer.mlp_conv.base_kernel.detach()
    return ops.decoder_weights(weights)


def _projection(conv: GroupedDynamicCausalConv) -> PackedLinear:
    assert isinstance(conv.kernel_projection, nn.Linear)
    return fuse((conv.kernel_projection,))


class DeviceLayers:
    """Layer by layer, as `target_group/device_decoder.py` has them, with the attention of all blocks in one call."""

    def __init__(self, network: DflashNetwork) -> None:
        self._config = network.config
        self._layers = [_FusedLayer(layer) for layer in network.layers]
        self._norm = network.norm.weight.detach().float()

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, pages: ContextPages, places: BlockPlaces) -> Tensor:
        """Block rows [N, B, H] whose positions turn by cos and sin [N * B, d], layers and final norm; x may change."""
        tables = StepTables(*(table.numpy() for table in places[1:]), np.empty(0, np.int64))
        return self.run(x, cos, sin, pages, places.slots, plan(tables, places.slots, PAGE_SIZE))

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, pages: ContextPages, slots: Tensor, planned: StepAttention
    ) -> Tensor:
        """The same where attention is planned. Waits for nothing."""
        hidden, delta = x.flatten(0, 1).contiguous(), None
        for index, layer in enumerate(self._layers):
            attention = partial(self._attention, index, layer, (cos, sin), pages, slots, planned)
            normed = self._add_norm(hidden, delta, layer.input_norm)
            delta = layer.around_attention(normed.view_as(x), attention).flatten(0, 1)
            normed = self._add_norm(hidden, delta, layer.post_norm)
            delta = layer.around_mlp(normed.view_as(x), layer.mlp).flatten(0, 1)
        return self._add_norm(hidden, delta, self._norm).view_as(x)

    def _add_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        return layer_ops.add_norm(hidden, delta, None, weight, self._config.rms_norm_eps, 1.0)

    def _attention(
        self,
        index: int,
        layer: _FusedLayer,
        turns: tuple[Tensor, Tensor],
        pages: ContextPages,
        slots: Tensor,
        planned: StepAttention,
        normed: Tensor,
    ) -> Tensor:
        """The attention sublayer: rows [N, B, H] to [N, B, H]."""
        config, keys, values = self._config, pages.keys[index], pages.values[index]
        qkv = layer.qkv(normed.flatten(0, 1))
        layer_ops.turn_and_store(qkv, layer.q_norm, layer.k_norm, *turns, slots, keys, values, config.rms_norm_eps)
        heads = (config.num_attention_heads, config.head_dim)
        queries = qkv[:, : heads[0] * heads[1]].unflatten(-1, heads)
        scale, window = config.head_dim**-0.5, config.windows[index] or 0
        attended = planned.attend(queries, None, None, keys, values, scale, window, is_causal=config.is_causal[index])
        return layer.output(attended.flatten(1)).view_as(normed)


class _FusedLayer:
    """What a layer computes, in pieces; norms are float32.

    `around_attention` and `around_mlp` take the normed rows and the sublayer.
    """

    def __init__(self, layer: DflashLayer) -> None:
        attention = layer.self_attn
        self.input_norm = layer.input_layernorm.weight.detach().float()
        self.post_norm = layer.post_attention_layernorm.weight.detach().float()
        self.q_norm, self.k_norm = (norm.weight.detach().float() for norm in (attention.q_norm, attention.k_norm))
        self.qkv = fuse((attention.q_proj, attention.k_proj, attention.v_proj))
        self.output = fuse((attention.o_proj,))
        self.gate_up = fuse((layer.mlp.gate_proj, layer.mlp.up_proj))
        self.down = fuse((layer.mlp.down_proj,))
        self.around_attention = _around(getattr(layer, "attention_conv", None))
        self.around_mlp = _around(getattr(layer, "mlp_conv", None))

    def mlp(self, normed: Tensor) -> Tensor:
        """Rows [N, B, H] to [N, B, H]."""
        activated = layer_ops.activate(self.gate_up(normed.flatten(0, 1)), is_gelu=False)
        return self.down(activated).view_as(normed)


def _around(conv: GroupedDynamicCausalConv | None) -> Around:
    """What stands around a sublayer: in DFlash nothing, in DFlash 2 a convolution on both sides."""
    if conv is None:
        return lambda normed, sublayer: sublayer(normed)
    projection, base = _projection(conv), conv.base_kernel.detach().float()

    def around(normed: Tensor, sublayer: Rows) -> Tensor:
        rows, block = normed.flatten(0, 1), normed.shape[1]
        coefficients = projection(rows)
        inner = sublayer(layer_ops.convolve(rows, coefficients, base, 0, block).view_as(normed))
        return layer_ops.convolve(inner.flatten(0, 1), coefficients, base, 1, block).view_as(normed)

    return around
