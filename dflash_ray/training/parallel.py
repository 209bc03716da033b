"""Many draft blocks of a conversation in one pass, under the mask that they have one by one when serving.

A block at anchor s sees context rows t < s (strictly: the anchor's own features are not known then) and its own slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_ray.models.dflash import DflashNetwork


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
        [C, A, B, H]. Full attention layers only; windows and causal layers are not trained here.
    """
    num_conversations, num_anchors, block_size, hidden = embeddings.shape
    length = features.shape[1]
    cos, sin = (table[:, None].to(features.dtype) for table in rope)
    positions = anchors[:, :, None] + torch.arange(block_size)
    block_rope = (cos[positions].flatten(1, 2), sin[positions].flatten(1, 2))
    hides_context = torch.arange(length)[None, None] >= anchors[:, :, None]  # [C, A, T]
    bias = torch.zeros(hides_context.shape, dtype=torch.float32).masked_fill_(hides_context, float("-inf"))
    bias = bias[:, None, :, None].expand(-1, -1, -1, block_size, -1).flatten(2, 3)  # [C, 1, A*B, T]
    x = embeddings.flatten(1, 2)
    for layer in network.layers:
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        queries = attention.queries(normed, *block_rope)
        context = attention.keys_values(features, cos[:length], sin[:length])
        block = attention.keys_values(normed, *block_rope)
        out = _attend(queries, context, block, bias, num_anchors)
        x = x + attention.o_proj(out)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return network.norm(x).view(num_conversations, num_anchors, block_size, hidden)


def _attend(
    queries: Tensor, context: tuple[Tensor, Tensor], block: tuple[Tensor, Tensor], bias: Tensor, num_anchors: int
) -> Tensor:
    """One softmax over the context's keys and the block's own, without a mask between blocks.

    queries [C, A*B, n_q, d]; context keys and values [C, T, n_kv, d]; block keys and values [C, A*B, n_kv, d].
    """
    num_heads, head_dim = queries.shape[2:]
    repeats = num_heads // context[0].shape[2]
    q = queries.transpose(1, 2) * head_dim**-0.5  # [C, n_q, A*B, d]
    context_k, context_v, block_k, block_v = (
        part.repeat_interleave(repeats, dim=2).transpose(1, 2) for part in (*context, *block)
    )
    by_block = (num_anchors, -1)
    context_scores = (q @ context_k.transpose(-1, -2)).float() + bias
    block_scores = (q.unflatten(2, by_block) @ block_k.unflatten(2, by_block).transpose(-1, -2)).float()
    scores = torch.cat((context_scores, block_scores.flatten(2, 3)), dim=-1)
    weights = F.softmax(scores, dim=-1).to(q.dtype)
    length = context_scores.shape[-1]
    own = weights[..., length:].unflatten(2, by_block) @ block_v.unflatten(2, by_block)
    out = weights[..., :length] @ context_v + own.flatten(2, 3)
    return out.transpose(1, 2).flatten(2)
