"""Drafter checkpoints: safetensors and config.json in the published z-lab layout or the one of speculators.

Own tensors of the drafter take the place of the target's: `embed_tokens.weight`, `lm_head.weight`. A reduced draft
vocabulary is stored as `d2t`, int64 [draft_vocab_size]: target id = draft id + d2t[draft id].
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dflash_ray.config import BUILTIN_DRAFTER
from dflash_ray.core.files import replacing, write_text
from dflash_ray.models.dflash import ContextProjector, DflashConfig, DflashNetwork
from dflash_ray.models.drafter_config import parse_dflash_config
from dflash_ray.models.target_checkpoint import TargetCheckpoint

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_IGNORED = ("t2d", "verifier_lm_head.weight", "verifier_norm.weight")  # d2t the other way round, the target's own
# Some trainers store the codebooks as modules, the published layout as bare tensors.
_RENAMED = {
    f"candidate_selector.{name}.weight": f"candidate_selector.{name}"
    for name in ("predecessor_codebook", "successor_codebook")
}
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class DrafterCheckpoint:
    """A drafter's configuration and weights, checked against its target.

    Attributes:
        fingerprint: hash of config.json and all weights; features are valid only for the fingerprint that made them.
        draft_ids: int64 [draft_vocab_size], target ids of the reduced draft vocabulary, or None.
        embedding, head: the drafter's own, or None for the target's; the head has a row for each draft token.
    """

    config: DflashConfig
    weights: dict[str, Tensor]
    fingerprint: str

    @property
    def draft_ids(self) -> Tensor | None:
        offsets = self.weights.get("d2t")
        return None if offsets is None else torch.arange(len(offsets)) + offsets

    @property
    def embedding(self) -> Tensor | None:
        return self.weights.get(_EMBEDDING)

    @property
    def head(self) -> Tensor | None:
        return self.weights.get(_HEAD, self.embedding if self.config.ties_embeddings else None)

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
    """Reads config.json and the safetensors. Raises ValueError that names what is wrong and how to put it right."""
    where = f"drafter {directory}"
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{where}: config.json is missing; give a directory in the published DFlash layout")
    try:
        values = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"{where}: config.json is not JSON ({error}); copy the checkpoint again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: config.json must be a mapping of keys; copy the checkpoint again")
    config = parse_dflash_config(values, where)
    _check_target(config, target, where)
    digest = hashlib.sha256(config_file.read_bytes())
    weights: dict[str, Tensor] = {}
    for file in _weight_files(directory, where):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        try:
            weights.update(load_file(file))
        except SafetensorError as error:
            raise ValueError(
                f"{where}: {file.name} is truncated or corrupt ({error}); copy the checkpoint again"
            ) from None
    weights = {_RENAMED.get(name, name): tensor for name, tensor in weights.items() if name not in _IGNORED}
    _check_weights(config, weights, where)
    return DrafterCheckpoint(config, weights, digest.hexdigest()[:16])


def _weight_files(directory: Path, where: str) -> list[Path]:
    """The safetensors of a directory, by its index where it has one. Pickles can run code, so they are never read."""
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{where}: {pickles} are pickles, which are never read; convert them to safetensors and remove"
        )
    index = directory / _INDEX
    if not index.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{where}: there are no *.safetensors; give a directory in the published DFlash layout")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {_INDEX} has no readable weight_map ({error}); copy the checkpoint again") from None
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ValueError(
                f"{where}: {_INDEX} names {name}, which is not in the directory; copy the checkpoint again"
            )
    return [directory / name for name in names]


def save_drafter(directory: Path, config_values: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Writes model.safetensors and config.json, each whole or not at all. Raises DiskFullError."""
    # Python's own file, which others may read as the umask says; safetensors' is its owner's alone.
    with replacing(directory / "model.safetensors") as partial:
        partial.write_bytes(save({name: tensor.contiguous() for name, tensor in weights.items()}))
    write_text(directory / "config.json", json.dumps(config_values, indent=2) + "\n")


def _check_target(config: DflashConfig, target: TargetCheckpoint, where: str) -> None:
    for key in ("hidden_size", "vocab_size"):
        theirs, ours = getattr(config, key), getattr(target.config, key)
        if theirs != ours:
            raise ValueError(
                f"{where}: {key} is {theirs} but the target has {ours}; this drafter is for another target"
            )
    num_layers = target.config.num_hidden_layers
    if any(not 0 <= layer < num_layers for layer in config.target_layer_ids):
        raise ValueError(
            f"{where}: target_layer_ids {list(config.target_layer_ids)} are not all layers of the target, which has"
            f" {num_layers}; this drafter is for another target"
        )
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise ValueError(
            f"{where}: mask_token_id {config.mask_token_id} is outside the vocabulary of {config.vocab_size};"
            " give the token that the drafter was trained with"
        )
    if config.tokenizer_hash is not None and config.tokenizer_hash != target.tokenizer_hash:
        raise ValueError(
            f"{where}: tokenizer_hash is {config.tokenizer_hash} but the target's is {target.tokenizer_hash};"
            " this drafter was trained with another tokenizer"
        )


def _check_weights(config: DflashConfig, weights: dict[str, Tensor], where: str) -> None:
    rows = config.draft_vocab_size or config.vocab_size
    with torch.device("meta"):
        expected = {**ContextProjector(config).state_dict(), **DflashNetwork(config).state_dict()}
        own = {
            _EMBEDDING: torch.empty(config.vocab_size, config.hidden_size),
            _HEAD: torch.empty(rows, config.hidden_size),
        }
        if config.draft_vocab_size is not None:
            expected["d2t"] = torch.empty(rows)
    expected |= {name: tensor for name, tensor in own.items() if name in weights}
    missing, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(
            f"{where}: tensors missing {sorted(missing)[:4]}, unknown {sorted(unknown)[:4]};"
            " config.json and the weights must be of one checkpoint"
        )
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"{where}: {name} is {tuple(weights[name].shape)} but config.json says {tuple(tensor.shape)};"
                " config.json and the weights must be of one checkpoint"
            )
    if config.draft_vocab_size is not None:
        ids = torch.arange(rows) + weights["d2t"]
        if ids.min() < 0 or ids.max() >= config.vocab_size or (ids.diff() <= 0).any():
            raise ValueError(f"{where}: d2t does not map to rising ids of the target's vocabulary; export it again")
