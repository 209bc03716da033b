"""Many draft blocks of a conversation in one pass, under the mask that they have one by one when serving.

A block at anchor s sees context rows t < s (strictly: the anchor's own features are not known then) and its own slots.
Causal layers hide a block's later slots, sliding layers everything `window` or more positions away. Blocks keep an axis
of their own throughout, so that what mixes the slots of a block needs no mask between blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_ray.models.dflash import DflashAttention, DflashNetwork
from dflash_ray.models.dflash2 import GroupedDynamicCausalConv

_HIDDEN = float("-inf")


def forward_blocks(
    network: DflashNetwork, features: Tensor, anchors: Tensor, embeddings: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """Final hidden states of all block slots.

    Args:
        features: context features [C, T, H].
        anchors: int64 [C, A], positions of the anchor tokens.
        embeddings: block inputs [C, A, B, H].
        rope: cos and sin tables [positions, d].

    Returns:
        [C, A, B, H].
    """
    config = network.config
    length, block_size = features.shape[1], embeddings.shape[2]
    cos, sin = (table[:, None].to(features.dtype) for table in rope)
    positions = anchors[:, :, None] + torch.arange(block_size, device=anchors.device)  # [C, A, B]
    context_rope = cos[:length], sin[:length]
    block_rope = cos[positions], sin[positions]  # [C, A, B, 1, d]
    kinds = list(zip(config.is_causal, config.windows, strict=True))
    masks = {kind: _masks(positions, length, *kind) for kind in set(kinds)}
    x = embeddings
    layers: Any = network.layers  # torch types the items of a list of modules as anything but callable
    for layer, kind in zip(layers, kinds, strict=True):
        attention = partial(
            _attention,
            layer.self_attn,
            features=features,
            block_rope=block_rope,
            context_rope=context_rope,
            context_mask=masks[kind][0],
            block_mask=masks[kind][1],
        )
        x = x + _around(getattr(layer, "attention_conv", None), layer.input_layernorm(x), attention)
        x = x + _around(getattr(layer, "mlp_conv", None), layer.post_attention_layernorm(x), layer.mlp)
    hidden: Tensor = network.norm(x)
    return hidden


def _around(conv: GroupedDynamicCausalConv | None, normed: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
    """A sublayer's output for rows [C, A, B, H], inside the convolutions that DFlash 2 has around it."""
    if conv is None:
        return sublayer(normed)
    convolved: Tensor = conv(normed.flatten(0, 1), lambda rows: sublayer(rows.view(normed.shape)).flatten(0, 1))
    return convolved.view(normed.shape)


def _masks(positions: Tensor, length: int, is_causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """What a slot may not see, as additive float32 masks: of the context [C, 1, A, B, T], of its own block [B, B]."""
    rows = torch.arange(length, device=positions.device)
    hides_context = (rows >= positions[:, :, :1, None]).expand(*positions.shape, length)
    slots = torch.arange(positions.shape[2], device=positions.device)
    distance = slots[:, None] - slots
    hides_block = distance < 0 if is_causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hides_context = hides_context | (positions[..., None] - rows >= window)
        hides_block = hides_block | (distance.abs() >= window)
    context = torch.zeros(hides_context.shape, device=positions.device).masked_fill_(hides_context, _HIDDEN)
    block = torch.zeros(hides_block.shape, device=positions.device).masked_fill_(hides_block, _HIDDEN)
    return context[:, None], block


def _attention(
    attention: DflashAttention,
    normed: Tensor,
    features: Tensor,
    block_rope: tuple[Tensor, Tensor],
    context_rope: tuple[Tensor, Tensor],
    context_mask: Tensor,
    block_mask: Tensor,
) -> Tensor:
    """One softmax over the context's keys and the block's own: normed [C, A, B, H] to [C, A, B, H]."""
    num_anchors, block_size = normed.shape[1:3]
    queries = attention.queries(normed, *block_rope)  # [C, A, B, n_q, d]
    num_heads, head_dim = queries.shape[-2:]
    repeats = num_heads // attention.config.num_key_value_heads
    q = queries.movedim(-2, 1) * head_dim**-0.5  # [C, n_q, A, B, d]
    context_k, context_v = (
        part.repeat_interleave(repeats, dim=-2).movedim(-2, 1)  # [C, n_q, T, d]
        for part in attention.keys_values(features, *context_rope)
    )
    block_k, block_v = (
        part.repeat_interleave(repeats, dim=-2).movedim(-2, 1)  # [C, n_q, A, B, d]
        for part in attention.keys_values(normed, *block_rope)
    )
    context_scores = (q.flatten(2, 3) @ context_k.transpose(-1, -2)).unflatten(2, (num_anchors, block_size)).float()
    block_scores = (q @ block_k.transpose(-1, -2)).float()
    scores = torch.cat((context_scores + context_mask, block_scores + block_mask), dim=-1)
    weights = F.softmax(scores, dim=-1).to(block_v.dtype)
    length = features.shape[1]
    from_context = weights[..., :length].flatten(2, 3) @ context_v
    from_block = weights[..., length:] @ block_v
    out = from_context.unflatten(2, (num_anchors, block_size)) + from_block  # [C, n_q, A, B, d]
    projected: Tensor = attention.o_proj(out.movedim(1, -2).flatten(-2))
    return projected
