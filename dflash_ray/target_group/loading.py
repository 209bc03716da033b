"""A rank's part of the weights: read slice by slice where the checkpoint allows it, else loaded whole and split.

DeepSpeed splits a model without weights, so what a rank holds is its decision. Only that is then read, straight to the
model's device.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dflash_ray.models.target_checkpoint import TargetCheckpoint
from dflash_ray.models.weight_files import WeightFiles
from dflash_ray.target_group.attention import IMPLEMENTATION, register
from dflash_ray.target_group.head import VocabParallelHead, own_tokens
from dflash_ray.target_group.tensor_parallel import is_split_plainly, kept_buffers, own_part, split_over_ranks

logger = logging.getLogger(__name__)


class _CannotSlice(Exception):
    """The text says what a rank cannot read in slices."""


@dataclass(frozen=True, slots=True)
class RankWeights:
    """What a rank runs.

    Attributes:
        base: the decoder; its split layers are DeepSpeed's.
        text_config: of transformers.
    """

    base: Any
    head: VocabParallelHead
    text_config: Any


def load_rank(checkpoint: TargetCheckpoint, dtype: torch.dtype, tp_rank: int, tp_size: int, device: str) -> RankWeights:
    """Loads this rank's part. Collective over the ranks, of which all read slices or none does."""
    try:
        return load_slices(checkpoint, dtype, tp_rank, tp_size, device)
    except _CannotSlice as reason:
        logger.info("each rank loads the whole model before it keeps its part: %s", reason)
    return load_whole(checkpoint, dtype, tp_rank, tp_size, device)


def load_whole(
    checkpoint: TargetCheckpoint, dtype: torch.dtype, tp_rank: int, tp_size: int, device: str
) -> RankWeights:
    """Loads all weights into the host's memory, and keeps this rank's part."""
    model: Any = checkpoint.load_model(dtype)
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    head = VocabParallelHead(model, tp_rank, tp_size, device)
    return RankWeights(split_over_ranks(model.get_decoder(), tp_size, dtype), head, model.config.get_text_config())


def load_slices(
    checkpoint: TargetCheckpoint, dtype: torch.dtype, tp_rank: int, tp_size: int, device: str
) -> RankWeights:
    """Reads nothing but this rank's part."""
    files = checkpoint.weights
    if files is None:
        raise _CannotSlice("its weights are in no safetensors file")
    model: Any = checkpoint.skeleton(dtype)
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    base = model.get_decoder()
    prefix = _name_of(base, model) + "."
    _check_names(model, base, prefix, files)
    text_config = model.config.get_text_config()
    _read_head(model, files, own_tokens(text_config.vocab_size, tp_rank, tp_size))
    head = VocabParallelHead(model, tp_rank, tp_size, device)
    del model
    base = split_over_ranks(base, tp_size, dtype)
    for name, part in base.named_modules():
        if not is_split_plainly(part):
            raise _CannotSlice(f"{name} is a {type(part).__name__}")
    if tp_size == 1:
        with kept_buffers(base):
            base.to_empty(device=device)
    base.to(device)  # the buffers; parameters are there
    for name, part in base.named_modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                files.read_into(parameter, f"{prefix}{name}.{key}", *own_part(part, key))
    return RankWeights(base, head, text_config)


def _name_of(module: nn.Module, parent: nn.Module) -> str:
    return next(str(name) for name, child in parent.named_modules() if child is module)


def _check_names(model: Any, base: Any, prefix: str, files: WeightFiles) -> None:
    """Some families are stored under other names or in another layout, which transformers knows."""
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        raise _CannotSlice("some layers stay in float32")
    for name in base.state_dict():
        if prefix + name not in files:
            raise _CannotSlice(f"the checkpoint has no {prefix}{name}")


def _read_head(model: Any, files: WeightFiles, tokens: slice) -> None:
    """Gives the model a head of these tokens alone."""
    layer = model.get_output_embeddings()
    name = _name_of(layer, model) + ".weight"
    if name not in files:
        name = model.get_expanded_tied_weights_keys(all_submodels=True).get(name, name)
    if name not in files:
        raise _CannotSlice(f"the checkpoint has no {name}")
    if layer.bias is not None and _name_of(layer, model) + ".bias" not in files:
        raise _CannotSlice("the checkpoint has no bias of the head")
    start, stop, _ = tokens.indices(layer.out_features)
    with torch.device("meta"):
        own = nn.Linear(layer.in_features, stop - start, layer.bias is not None, dtype=layer.weight.dtype)
    own = own.to_empty(device="cpu")
    files.read_into(own.weight, name, 0, start)
    if own.bias is not None:
        files.read_into(own.bias, _name_of(layer, model) + ".bias", 0, start)
    model.set_output_embeddings(own)
