"""Drafter checkpoints in the published z-lab layout: config.json and safetensors.

A reduced draft vocabulary is stored as `d2t`, int64 [draft_vocab_size]: target id = draft id + d2t[draft id].
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_ray.config import BUILTIN_DRAFTER
from dflash_ray.models.dflash import ContextProjector, DflashConfig, DflashNetwork
from dflash_ray.models.target_checkpoint import TargetCheckpoint

ARCHITECTURE = "DFlashDraftModel"
_IGNORED = ("embed_tokens.weight", "lm_head.weight", "t2d")  # some publishers add copies of the target's
_PICKLES = (".bin", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class DrafterCheckpoint:
    """A drafter's configuration and weights, checked against its target.

    Attributes:
        fingerprint: hash of config.json and all weights; features are valid only for the fingerprint that made them.
        d2t: offsets of the reduced draft vocabulary, or None.
    """

    config: DflashConfig
    weights: dict[str, Tensor]
    fingerprint: str

    @property
    def d2t(self) -> Tensor | None:
        return self.weights.get("d2t")

    def build_projector(self, dtype: torch.dtype = torch.float32) -> ContextProjector:
        """fc and hidden_norm, for the target's process."""
        projector = ContextProjector(self.config)
        projector.load_state_dict({k: self.weights[k] for k in projector.state_dict()})
        return projector.to(dtype).eval().requires_grad_(False)

    def build_network(self, dtype: torch.dtype = torch.float32) -> DflashNetwork:
        """Layers and norm, for the drafter's process."""
        network = DflashNetwork(self.config)
        network.load_state_dict({k: self.weights[k] for k in network.state_dict()})
        return network.to(dtype).eval().requires_grad_(False)


def resolve_drafter(path: str, target: TargetCheckpoint) -> DrafterCheckpoint:
    """Loads the drafter that a `drafter.path` names. Raises ValueError when it does not fit the target."""
    if path == BUILTIN_DRAFTER:
        return load_drafter(Path(__file__).parent.parent / "assets" / path.removeprefix("builtin:"), target)
    if path.startswith("builtin:"):
        raise ValueError(f"drafter.path: {path} is unknown; the builtin drafter is {BUILTIN_DRAFTER}")
    return load_drafter(Path(path), target)


def load_drafter(directory: Path, target: TargetCheckpoint) -> DrafterCheckpoint:
    """Reads config.json and *.safetensors. Raises ValueError that names what is wrong and how to put it right."""
    where = f"drafter {directory}"
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{where}: config.json is missing; give a directory in the published DFlash layout")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        found = [file.name for file in directory.iterdir() if file.suffix in _PICKLES]
        hint = f"{found} are pickles, which are never loaded; convert them" if found else "none found"
        raise ValueError(f"{where}: weights must be *.safetensors ({hint})")
    values = json.loads(config_file.read_text())
    config = parse_dflash_config(values, where)
    _check_target(config, target, where)
    weights: dict[str, Tensor] = {}
    digest = hashlib.sha256(config_file.read_bytes())
    for file in files:
        digest.update(file.read_bytes())
        try:
            weights.update(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"{where}: {file.name} is truncated or corrupt ({error})") from None
    weights = {name: tensor for name, tensor in weights.items() if name not in _IGNORED}
    _check_weights(config, weights, where)
    return DrafterCheckpoint(config, weights, digest.hexdigest()[:16])


def save_drafter(directory: Path, config_values: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Writes config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_values, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")


def parse_dflash_config(values: dict[str, Any], where: str) -> DflashConfig:
    """The published config.json as a DflashConfig; keys of `dflash_config` win over top-level ones."""
    if values.get("architectures") != [ARCHITECTURE]:
        raise ValueError(f"{where}: architectures is {values.get('architectures')}; [{ARCHITECTURE!r}] is supported")
    nested = values.get("dflash_config") or {}

    def get(key: str, default: Any = None) -> Any:
        value = nested.get(key, values.get(key, default))
        if value is None:
            raise ValueError(f"{where}: config.json lacks {key}")
        return value

    num_layers = int(get("num_hidden_layers"))
    layer_types = values.get("layer_types") or ["full_attention"] * num_layers
    is_sliding = [kind == "sliding_attention" for kind in layer_types]
    override = values.get("is_causal")
    rope = values.get("rope_parameters") or {}
    return DflashConfig(
        hidden_size=int(get("hidden_size")),
        num_hidden_layers=num_layers,
        num_attention_heads=int(get("num_attention_heads")),
        num_key_value_heads=int(get("num_key_value_heads")),
        head_dim=int(get("head_dim", int(get("hidden_size")) // int(get("num_attention_heads")))),
        intermediate_size=int(get("intermediate_size")),
        rms_norm_eps=float(get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        vocab_size=int(get("vocab_size")),
        max_position_embeddings=int(get("max_position_embeddings", 32768)),
        block_size=int(get("block_size", 16)),
        mask_token_id=int(get("mask_token_id")),
        target_layer_ids=tuple(
            nested.get("target_layer_ids") or _default_layer_ids(int(get("num_target_layers")), num_layers)
        ),
        is_causal=tuple(bool(override) if override is not None else sliding for sliding in is_sliding),
        windows=tuple(int(get("sliding_window")) if sliding else None for sliding in is_sliding),
        attention_bias=bool(values.get("attention_bias", False)),
        input_embedding_scale=float(get("input_embedding_scale", 1.0)),
        output_multiplier=float(get("output_multiplier", 1.0)),
        final_logit_softcapping=float(get("final_logit_softcapping", 0.0)),
        draft_vocab_size=values.get("draft_vocab_size"),
    )


def _default_layer_ids(num_target_layers: int, num_layers: int) -> list[int]:
    if num_layers == 1:
        return [num_target_layers // 2]
    return [round(1 + i * (num_target_layers - 4) / (num_layers - 1)) for i in range(num_layers)]


def _check_target(config: DflashConfig, target: TargetCheckpoint, where: str) -> None:
    for key in ("hidden_size", "vocab_size"):
        theirs, ours = getattr(config, key), getattr(target.config, key)
        if theirs != ours:
            raise ValueError(
                f"{where}: {key} is {theirs} but the target has {ours}; this drafter is for another target"
            )
    num_layers = target.config.num_hidden_layers
    if any(not 0 <= layer < num_layers for layer in config.target_layer_ids):
        raise ValueError(f"{where}: target_layer_ids {config.target_layer_ids} exceed the target's {num_layers} layers")
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise ValueError(f"{where}: mask_token_id {config.mask_token_id} is outside the vocabulary")


def _check_weights(config: DflashConfig, weights: dict[str, Tensor], where: str) -> None:
    with torch.device("meta"):
        expected = {**ContextProjector(config).state_dict(), **DflashNetwork(config).state_dict()}
    if config.draft_vocab_size is not None:
        expected["d2t"] = torch.empty(config.draft_vocab_size, device="meta")
    missing, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(f"{where}: tensors missing {sorted(missing)[:4]}, unknown {sorted(unknown)[:4]}")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(f"{where}: {name} is {tuple(weights[name].shape)}, config.json says {tuple(tensor.shape)}")
