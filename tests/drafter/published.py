"""Tiny random drafters in the published layout, in every shape that a checkpoint of it may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflash_ray.models.dflash import ContextProjector, DflashNetwork
from dflash_ray.models.drafter_checkpoint import save_drafter
from dflash_ray.models.drafter_config import parse_dflash_config
from tests.tiny import SHAPE

NUM_TARGET_LAYERS = 7
VOCAB, HIDDEN, BLOCK, MASK = SHAPE["vocab_size"], SHAPE["hidden_size"], 6, 90
VALUES: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "num_target_layers": NUM_TARGET_LAYERS,
    "block_size": BLOCK,
    "dflash_config": {"target_layer_ids": [1, 4], "mask_token_id": MASK},
}


def changed(**changes: Any) -> dict[str, Any]:
    """VALUES with other keys; those of dflash_config are added to it."""
    nested = VALUES["dflash_config"] | changes.pop("dflash_config", {})
    return VALUES | changes | {"dflash_config": nested}


def sliding(*layer_types: str, **changes: Any) -> dict[str, Any]:
    kinds = [f"{kind}_attention" for kind in layer_types]
    window = {"layer_types": kinds, "sliding_window": 5, "use_sliding_window": True}
    return changed(num_hidden_layers=len(kinds), **window, **changes)


def scaled_rope(**parameters: Any) -> dict[str, Any]:
    return changed(rope_parameters={"rope_theta": 10000.0, **parameters})


def dflash2(kernel: int = 2, group: int = 16, rank: int = 8, top_k: int = 5, **changes: Any) -> dict[str, Any]:
    sizes = {"conv_kernel_size": kernel, "conv_group_size": group, "selector_rank": rank, "selector_top_k": top_k}
    nested = sizes | changes.pop("dflash_config", {})
    return changed(architectures=["DFlash2DraftModel"], dflash_config=nested, **changes)


def without_layer_ids(num_layers: int) -> dict[str, Any]:
    return changed(num_hidden_layers=num_layers) | {"dflash_config": {"mask_token_id": MASK}}


SCALES = {"input_embedding_scale": 1.7, "output_multiplier": 0.6, "final_logit_softcapping": 4.0}
WINDOW_2 = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "use_sliding_window": True}
DFLASH = {
    "full attention": changed(),
    "one layer": changed(num_hidden_layers=1),
    "sliding causal and full": sliding("sliding", "full"),
    "sliding causal": sliding("sliding", "sliding"),
    "sliding bidirectional": sliding("sliding", "sliding", is_causal=False),
    "causal everywhere": changed(is_causal=True),
    "window of the last layers": changed(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "biases": changed(attention_bias=True),
    "embedding scale, multiplier and soft cap": changed(dflash_config=SCALES),
    "scales at the top level": changed(**SCALES),
    "more taps than layers": changed(dflash_config={"target_layer_ids": [4, 0, 2, 5]}),
    "default taps of one layer": without_layer_ids(1),
    "default taps of three layers": without_layer_ids(3),
    "nested block size": changed(block_size=16, dflash_config={"block_size": 4}),
    "rope_parameters": scaled_rope(rope_type="default", rope_theta=500.0),
    "proportional rope": scaled_rope(rope_type="proportional", partial_rotary_factor=0.5),
    "linear rope": scaled_rope(rope_type="linear", factor=4.0),
    "llama3 rope": scaled_rope(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "yarn as rope_scaling": changed(
        rope_scaling={"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    ),
}
DFLASH2 = {
    "published sizes in small": dflash2(),
    "three taps, small groups": dflash2(kernel=3, group=8, rank=16, top_k=7),
    "one tap, one group": dflash2(kernel=1, group=HIDDEN, rank=4, top_k=1),
    "as many taps as slots": dflash2(kernel=4, group=24, rank=3, top_k=12, block_size=4),
    "causal everywhere": dflash2(is_causal=True),
    "windows and scales": dflash2(kernel=2, group=4, rank=8, top_k=5, dflash_config=SCALES, **WINDOW_2),
}


def random_weights(values: dict[str, Any], seed: int = 0, spread: float = 1.0) -> dict[str, Tensor]:
    """Weights of the sizes that `values` ask for; `spread` scales all that are not norms."""
    config = parse_dflash_config(values, "test")
    generator = torch.Generator().manual_seed(seed)
    shapes = {**ContextProjector(config).state_dict(), **DflashNetwork(config).state_dict()}
    return {
        name: spread * torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
        + (1.0 if "norm" in name else 0.0)
        for name, tensor in shapes.items()
    }


def save_random(directory: Path, values: dict[str, Any], seed: int = 0, **extra: Tensor) -> Path:
    """A checkpoint directory; `extra` tensors are added, by their names with dots for double underscores."""
    weights = random_weights(values, seed) | {name.replace("__", "."): tensor for name, tensor in extra.items()}
    save_drafter(directory, values, weights)
    return directory
