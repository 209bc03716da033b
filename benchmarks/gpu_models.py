"""Random weights in the shape of a large target and of a published drafter: they take the time that real ones take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config

from dflash_ray.models.dflash import ContextProjector, DflashNetwork
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.drafter_config import parse_dflash_config
from dflash_ray.models.target_checkpoint import TargetCheckpoint

_BLOCK = 1 << 22  # random numbers, repeated: as many as an 8B model has would take minutes
TARGETS = {
    "8b": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    },
}  # fmt: skip
_DRAFTER_LAYERS = {"8b": 5, "tiny": 2}
_TAPS = {"8b": [1, 9, 17, 25, 33], "tiny": [0, 2]}


@dataclass(frozen=True)
class RandomTarget(TargetCheckpoint):
    """A Qwen3 of one of TARGETS, with a head of its own, which lies in no file."""

    shape: str = "tiny"

    @cached_property
    def config(self) -> Qwen3Config:
        return Qwen3Config(
            **TARGETS[self.shape], tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None
        )

    @cached_property
    def weights(self) -> None:
        return None

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        """All parameters, float32 or, of the large shape, bfloat16."""
        dtype = torch.bfloat16 if self.shape == "8b" else torch.float32
        return {name: _random(tuple(one.shape), name, dtype) for name, one in self.skeleton().named_parameters()}

    def load_model(self, dtype: torch.dtype = torch.float32) -> Any:
        model = self.skeleton(dtype)
        model.load_state_dict({name: one.to(dtype) for name, one in self._state.items()}, assign=True, strict=True)
        return model.requires_grad_(False)

    def load_embedding(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._state["model.embed_tokens.weight"].to(dtype)

    def load_head(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._state["lm_head.weight"].to(dtype)

    @property
    def bytes_a_step(self) -> int:
        """Of weights that every pass reads: all but the embedding, in bfloat16."""
        counted = (one.numel() for name, one in self.skeleton().named_parameters() if "embed_tokens" not in name)
        return 2 * sum(counted)


def random_drafter(shape: str) -> DrafterCheckpoint:
    """Of the published DFlash shape, block 16."""
    config = parse_dflash_config(
        TARGETS[shape]
        | {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "num_hidden_layers": _DRAFTER_LAYERS[shape],
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "num_target_layers": TARGETS[shape]["num_hidden_layers"],
            "block_size": 16,
            "dflash_config": {"target_layer_ids": _TAPS[shape], "mask_token_id": TARGETS[shape]["vocab_size"] - 5},
        },
        "random",
    )
    with torch.device("meta"):
        parts = {**ContextProjector(config).state_dict(), **DflashNetwork(config).state_dict()}
    weights = {name: _random(tuple(one.shape), name, torch.float32) for name, one in parts.items()}
    return DrafterCheckpoint(config, weights, "random")


def _random(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> Tensor:
    """Norms are ones; other weights keep the size of what they multiply."""
    if "norm" in name or len(shape) < 2:
        return torch.ones(shape, dtype=dtype)
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    block = (torch.randn(min(_BLOCK, count), generator=generator) / shape[-1] ** 0.5).to(dtype)
    return block.repeat(-(-count // len(block)))[:count].view(shape)
