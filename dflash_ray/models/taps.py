"""Taps: the raw outputs of a target's decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def tap_layers(decoder: Any, layer_ids: Iterable[int]) -> dict[int, Tensor]:
    """Hooks layers of a decoder; every pass leaves their outputs [batch, T, H] in the dictionary returned."""
    outputs: dict[int, Tensor] = {}
    for layer_id in set(layer_ids):
        decoder.layers[layer_id].register_forward_hook(_keep(outputs, layer_id))
    return outputs


def _keep(outputs: dict[int, Tensor], layer_id: int) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs[layer_id] = output[0] if isinstance(output, tuple) else output

    return hook
