"""A drafter layer's weights, fused and packed for the few rows of a draft block. Inference only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from dflash_ray.kernels import ops
from dflash_ray.models.dflash import DflashLayer, RmsNorm
from dflash_ray.models.dflash2 import GroupedDynamicCausalConv
from dflash_ray.models.packed_linear import fuse

Rows = Callable[[Tensor], Tensor]


class PackedLayer:
    """What a layer computes, in pieces; the attention itself belongs to whoever has the context.

    `around_attention` and `around_mlp` take the normed rows and the sublayer.
    """

    def __init__(self, layer: DflashLayer, is_dflash2: bool) -> None:
        attention = layer.self_attn
        self.input_norm = packed_norm(layer.input_layernorm)
        self.post_norm = packed_norm(layer.post_attention_layernorm)
        self.q_norm, self.k_norm = packed_norm(attention.q_norm), packed_norm(attention.k_norm)
        self.qkv = fuse((attention.q_proj, attention.k_proj, attention.v_proj))
        self.output = fuse((attention.o_proj,))
        self.gate_up = fuse((layer.mlp.gate_proj, layer.mlp.up_proj))
        self.down = fuse((layer.mlp.down_proj,))
        self.around_attention: Callable[[Tensor, Rows], Tensor] = _alone
        self.around_mlp: Callable[[Tensor, Rows], Tensor] = _alone
        if is_dflash2:
            self.around_attention, self.around_mlp = _packed(layer.attention_conv), _packed(layer.mlp_conv)

    def mlp(self, normed: Tensor) -> Tensor:
        return self.down(ops.silu_and_mul(self.gate_up(normed)))


def packed_norm(module: RmsNorm) -> Rows:
    return partial(ops.rms_norm, weight=module.weight.detach(), eps=module.eps)


def _alone(normed: Tensor, sublayer: Rows) -> Tensor:
    """DFlash: nothing stands around a sublayer."""
    return sublayer(normed)


def _packed(conv: GroupedDynamicCausalConv) -> GroupedDynamicCausalConv:
    assert isinstance(conv.kernel_projection, nn.Linear)
    conv.kernel_projection = fuse((conv.kernel_projection,))
    return conv
