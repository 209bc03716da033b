"""A new drafter for a target: its config.json, and the weights that its training starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dflash_ray.models.dflash import ContextProjector, DflashNetwork
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.drafter_config import ARCHITECTURE, ARCHITECTURE_2, ARCHITECTURE_2_FACTORISED
from dflash_ray.models.target_checkpoint import TargetCheckpoint
from dflash_ray.models.target_logits import embedding_scale, logit_factor, norm_weight, soft_cap
from dflash_ray.training.config import DrafterSection
from dflash_ray.training.objective import DrafterObjective

_NORM_EPS = 1e-6  # for targets whose own norms are of another kind
_RANDOM_SCALE = 0.24  # a quarter of what keeps the size of a row: a layer adds little to its input at first


def drafter_config_values(
    shape: DrafterSection, target: TargetCheckpoint, draft_vocab_size: int | None
) -> dict[str, Any]:
    """config.json of the drafter: the target's layer shape, with as many layers as are initialised."""
    source = target.config
    architecture = ARCHITECTURE
    if shape.dflash2 is not None:
        architecture = ARCHITECTURE_2_FACTORISED if shape.dflash2.factorised else ARCHITECTURE_2
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "qwen3",
        "hidden_size": source.hidden_size,
        "num_hidden_layers": len(shape.init_layer_ids),
        "num_attention_heads": source.num_attention_heads,
        "num_key_value_heads": source.num_key_value_heads,
        "head_dim": getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        "intermediate_size": source.intermediate_size,
        "rms_norm_eps": getattr(source, "rms_norm_eps", _NORM_EPS),
        "rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(source.rope_parameters)},
        "vocab_size": source.vocab_size,
        "max_position_embeddings": source.max_position_embeddings,
        "hidden_act": "silu",
        "num_target_layers": source.num_hidden_layers,
        "block_size": shape.block_size,
        "dflash_config": {
            "target_layer_ids": list(shape.tap_layer_ids),
            "mask_token_id": shape.mask_token_id,
            **_scales(target),
            **({} if shape.dflash2 is None else shape.dflash2.model_dump(exclude={"factorised"})),
        },
    }
    optional = {
        "draft_vocab_size": draft_vocab_size,
        "layer_types": None if shape.layer_types is None else list(shape.layer_types),
        "sliding_window": shape.sliding_window,
        "is_causal": shape.is_causal,
    }
    return values | {key: value for key, value in optional.items() if value is not None}


def _rope_theta(parameters: dict[str, Any]) -> float:
    """Of full attention, where a target has others for its sliding layers."""
    return float(parameters.get("full_attention", parameters)["rope_theta"])


def _scales(target: TargetCheckpoint) -> dict[str, float]:
    """What the target does to the rows of its embedding and to its head's products, where it does anything."""
    scales = {
        "input_embedding_scale": (embedding_scale(target), 1.0),
        "output_multiplier": (logit_factor(target.config), 1.0),
        "final_logit_softcapping": (soft_cap(target.config), 0.0),
    }
    return {key: value for key, (value, default) in scales.items() if value != default}


def initialise_from_drafter(objective: DrafterObjective, source: DrafterCheckpoint, vocabulary: Tensor) -> None:
    """Weights of a trained drafter of the same shape; what a DFlash drafter lacks of DFlash 2 stays as it starts.

    Raises ValueError when the shapes or the vocabularies of codebooks differ, or a weight is not finite.
    """
    parameters = objective.trainable()
    weights = {**source.build_projector().state_dict(), **source.build_network().state_dict()}
    missing = parameters.keys() - weights.keys()
    is_same = weights.keys() <= parameters.keys() and all(
        tensor.shape == parameters[name].shape for name, tensor in weights.items()
    )
    if not is_same or any(not _is_of_dflash2(name) for name in missing):
        raise ValueError("fit.init_drafter: its layers, taps or codebooks are not those of `drafter`")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"fit.init_drafter: its {name} is not finite; give a drafter that can draft")
    ids = torch.arange(source.config.vocab_size) if source.draft_ids is None else source.draft_ids
    has_codebooks = source.config.dflash2 is not None and not source.config.dflash2.is_factorised
    if has_codebooks and not torch.equal(ids, vocabulary):
        raise ValueError("fit.init_drafter: its codebooks number another draft vocabulary than the shards give")
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)


def _is_of_dflash2(name: str) -> bool:
    return "_conv." in name or name.startswith("candidate_selector.")


def initialise_new(
    projector: ContextProjector, network: DflashNetwork, shape: DrafterSection, target: TargetCheckpoint
) -> None:
    """The context feature starts as the mean of the taps, each layer as the target's or with small random weights.

    A random layer hardly changes its input at first. Where all are random, the final norm is one over the mean length
    of the head's rows: with large logits of the mask's embedding the first steps only teach not to repeat the mask.
    """
    num_taps = len(shape.tap_layer_ids)
    with torch.no_grad():
        projector.fc.weight.zero_()
        for block in projector.fc.weight.chunk(num_taps, dim=1):
            block.fill_diagonal_(1.0 / num_taps)
        layers = list(zip(network.layers, shape.init_layer_ids, strict=True))
        for layer, source_id in layers:
            if source_id is None:
                _draw(layer, network.config.hidden_size)
        if all(source_id is None for _, source_id in layers):
            factor = network.config.output_multiplier
            network.norm.weight.fill_(1.0 / (factor * target.load_head().norm(dim=-1).mean()))
            return
        base = target.load_model().get_decoder()
        try:
            for layer, source_id in layers:
                if source_id is not None:
                    _copy_layer(layer, base.layers[source_id])
            middle = base.layers[shape.tap_layer_ids[num_taps // 2]]
            projector.hidden_norm.weight.copy_(norm_weight(middle.input_layernorm))
            network.norm.weight.copy_(norm_weight(base.norm))
        except ValueError as error:
            raise ValueError(f"drafter.init_layer_ids: {error}; give null for layers that start at random") from None


def _copy_layer(layer: nn.Module, source: nn.Module) -> None:
    """Weights of a target's layer. Raises ValueError when its norms are others than a drafter's."""
    own, theirs = ({name: m for name, m in one.named_modules() if "norm" in name} for one in (layer, source))
    if unknown := theirs.keys() - own.keys():
        raise ValueError(f"the target's layers have {', '.join(sorted(unknown))}, which a drafter's lack")
    if missing := {name for name in own if not name.startswith("self_attn.")} - theirs.keys():
        raise ValueError(f"the target's layers lack {', '.join(sorted(missing))}, which a drafter's have")
    weights = source.state_dict() | {f"{name}.weight": norm_weight(norm) for name, norm in theirs.items()}
    layer.load_state_dict(weights, strict=False)


def _draw(layer: nn.Module, hidden_size: int) -> None:
    """Small random projections; norms and convolutions stay as they were built."""
    for name, parameter in layer.named_parameters():
        if not name.startswith(("self_attn.", "mlp.")):
            continue
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=_RANDOM_SCALE * hidden_size**-0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
