"""Where a batch's taps come from: the shards, or the target itself in the moment that they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dflash_ray.models.taps import tap_layers
from dflash_ray.models.target_checkpoint import TargetCheckpoint
from dflash_ray.training.shards import ShardStore

# Of conversations, the outputs of F layers: bfloat16 [C, T - 1, F * H], any values behind a conversation's end.
TapSource = Callable[[Sequence[int]], Tensor]


class StoredTaps:
    """Reads the taps of `layer_ids`. Raises ValueError when the shards lack one of the layers."""

    def __init__(self, store: ShardStore, layer_ids: tuple[int, ...]) -> None:
        missing = set(layer_ids) - set(store.layout.layer_ids)
        if missing:
            raise ValueError(
                f"drafter.tap_layer_ids: layers {sorted(missing)} are not in the shards, which hold "
                f"{list(store.layout.layer_ids)}; the last layer comes with regenerate.with_last_layer, and "
                "fit.online_taps needs none"
            )
        self._store = store
        self._layer_ids = layer_ids

    def __call__(self, indices: Sequence[int]) -> Tensor:
        return pad_sequence([self._store.taps(i, self._layer_ids) for i in indices], batch_first=True)


class OnlineTaps:
    """Runs the target over whole conversations.

    Args:
        dtype: the target's; a GPU computes float32 products as TF32 where torch allows it.
    """

    def __init__(
        self, store: ShardStore, target: TargetCheckpoint, layer_ids: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> None:
        self._store = store
        self._device = device
        self._decoder = target.load_model(dtype).get_decoder().to(device)
        self._layer_ids = layer_ids
        self._outputs = tap_layers(self._decoder, layer_ids)

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> Tensor:
        # Rows see what is before them alone, so that padding behind a conversation changes none of its rows.
        tokens = [self._store.conversations[i].token_ids[:-1] for i in indices]
        self._decoder(input_ids=pad_sequence(tokens, batch_first=True).to(self._device), use_cache=False)
        taps = torch.cat([self._outputs[layer_id].to(torch.bfloat16) for layer_id in self._layer_ids], dim=-1)
        self._outputs.clear()
        return taps
