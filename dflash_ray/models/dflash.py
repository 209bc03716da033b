"""The DFlash network: one bidirectional pass over [anchor, MASK, ...] that reads the target's hidden states.

DFlash 2 is the same network with the modules of dflash2.py in it. Numerics follow the published z-lab reference (PyPI
`dflash` 0.1.0). Shapes: T rows of context, B block slots, H hidden, F taps, n_q and n_kv heads of size d. Positions are
absolute; the slot k of a block stands at context length + k.

`ContextProjector` (fc and its norm) runs in the target's process, the rest where the drafter is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_ray.models.dflash2 import Dflash2Config, GroupedDynamicCausalConv, build_selector


@dataclass(frozen=True)
class DflashConfig:
    """Shape of a drafter; names as in the published config.json where it has them.

    Attributes:
        rope_frequencies: float32 inverse frequencies, d / 2 of them, any scaling of the checkpoint applied.
        rope_factor: what cos and sin are multiplied by; 1 for all kinds of rope but YaRN.
        target_layer_ids: decoder layers of the target whose outputs are the taps, in order of concatenation.
        is_causal: causal attention inside the block for each layer.
        windows: sliding window of each layer, or None for full attention.
        draft_vocab_size: rows of the drafter's reduced vocabulary, or None for the target's own.
        ties_embeddings: a drafter with an embedding of its own and no head uses the embedding as head.
        tokenizer_hash: TargetCheckpoint.tokenizer_hash of the target that it was trained for, or None if not stated.
        dflash2: shape of what DFlash 2 adds, or None for DFlash.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_frequencies: tuple[float, ...]
    vocab_size: int
    max_position_embeddings: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    is_causal: tuple[bool, ...]
    windows: tuple[int | None, ...]
    rope_factor: float = 1.0
    attention_bias: bool = False
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float = 0.0
    draft_vocab_size: int | None = None
    ties_embeddings: bool = False
    tokenizer_hash: str | None = None
    dflash2: Dflash2Config | None = None


def rope_tables(config: DflashConfig, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [num_positions, d], half-split layout."""
    frequencies = torch.tensor(config.rope_frequencies, dtype=torch.float32)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * config.rope_factor, angles.sin() * config.rope_factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., rows, heads, d] by tables that broadcast against it, e.g. [rows, 1, d]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, then the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scaled = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return scaled.to(x.dtype) * self.weight


class ContextProjector(nn.Module):
    """Raw taps [T, F*H] to context features [T, H]: the drafter's fc and hidden_norm."""

    def __init__(self, config: DflashConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, taps: Tensor) -> Tensor:
        return self.hidden_norm(self.fc(taps))


class DflashAttention(nn.Module):
    """Attention whose keys and values come from context features and from the block, by the same projections."""

    def __init__(self, config: DflashConfig) -> None:
        super().__init__()
        self.config = config
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, size, bias=bias)
        self.q_norm = RmsNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RmsNorm(config.head_dim, config.rms_norm_eps)

    def keys_values(self, rows: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (normed and rotated) and values of rows [..., n, H]: two tensors [..., n, n_kv, d]."""
        heads = (self.config.num_key_value_heads, self.config.head_dim)
        keys = self.k_norm(self.k_proj(rows).unflatten(-1, heads))
        return apply_rope(keys, cos, sin), self.v_proj(rows).unflatten(-1, heads)

    def queries(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries of rows [..., n, H]: [..., n, n_q, d]."""
        heads = (self.config.num_attention_heads, self.config.head_dim)
        return apply_rope(self.q_norm(self.q_proj(rows).unflatten(-1, heads)), cos, sin)


class DflashMlp(nn.Module):
    def __init__(self, config: DflashConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DflashLayer(nn.Module):
    """A Qwen3 block with injected context keys and values; the context skips input_layernorm.

    In DFlash 2 a convolution stands around each of the two sublayers.
    """

    def __init__(self, config: DflashConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DflashAttention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DflashMlp(config)
        if config.dflash2 is not None:
            self.attention_conv = GroupedDynamicCausalConv(config.hidden_size, config.dflash2)
            self.mlp_conv = GroupedDynamicCausalConv(config.hidden_size, config.dflash2)


class DflashNetwork(nn.Module):
    """Layers, final norm and, in DFlash 2, the candidate selector; embedding and head belong to the target."""

    def __init__(self, config: DflashConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DflashLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        if config.dflash2 is not None:
            num_tokens = config.draft_vocab_size or config.vocab_size
            self.candidate_selector = build_selector(num_tokens, config.hidden_size, config.dflash2)

    def shape_logits(self, logits: Tensor) -> Tensor:
        """The checkpoint's output multiplier and soft cap."""
        if self.config.output_multiplier != 1.0:
            logits = logits * self.config.output_multiplier
        cap = self.config.final_logit_softcapping
        return cap * torch.tanh(logits / cap) if cap > 0 else logits
