"""The target's taps of every conversation, stored once as bfloat16.

A capture that is cut off goes on at the conversation where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dflash_ray.training.dataset import Conversation


class TapStore:
    """Taps of conversations in one memory-mapped file, rows of all conversations one after the other."""

    def __init__(self, path: Path, lengths: list[int], width: int) -> None:
        self._starts = np.concatenate(([0], np.cumsum(lengths)))
        shape = (int(self._starts[-1]), width)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._progress = path.with_suffix(".done")
        is_new = not path.exists()
        self._data = np.memmap(path, dtype=np.uint16, mode="w+" if is_new else "r+", shape=shape)
        self._done = np.memmap(
            self._progress, dtype=np.uint8, mode="w+" if not self._progress.exists() else "r+", shape=(len(lengths),)
        )

    def is_done(self, index: int) -> bool:
        return bool(self._done[index])

    def put(self, index: int, taps: Tensor) -> None:
        """Stores bfloat16 taps [T, width] of a conversation."""
        self._data[self._starts[index] : self._starts[index + 1]] = taps.view(torch.int16).numpy().view(np.uint16)
        self._done[index] = 1

    def get(self, index: int) -> Tensor:
        """bfloat16 [T, width]."""
        rows = self._data[self._starts[index] : self._starts[index + 1]]
        return torch.from_numpy(rows.view(np.int16).copy()).view(torch.bfloat16)


@torch.inference_mode()
def capture(
    model: torch.nn.Module,
    layer_ids: tuple[int, ...],
    conversations: list[Conversation],
    indices: list[int],
    store: TapStore,
    report: Callable[[int, int], None] | None = None,
    batch_tokens: int = 4096,
) -> None:
    """Runs the target's base model over the conversations that are not stored yet, longest first."""
    pending = sorted((i for i in indices if not store.is_done(i)), key=lambda i: -len(conversations[i].token_ids))
    taps: dict[int, Tensor] = {}
    layers = model.layers
    hooks = [
        layers[layer].register_forward_hook(lambda _m, _a, out, layer=layer: taps.__setitem__(layer, out))
        for layer in layer_ids
    ]
    done = 0
    while pending:
        size = max(1, batch_tokens // len(conversations[pending[0]].token_ids))
        batch, pending = pending[:size], pending[size:]
        ids = torch.nn.utils.rnn.pad_sequence([conversations[i].token_ids for i in batch], batch_first=True)
        # Padding is on the right, so causal attention keeps it away from every row that is stored.
        model(ids, use_cache=False)
        rows = torch.cat([taps[layer] for layer in layer_ids], dim=-1).to(torch.bfloat16)
        for row, index in zip(rows, batch, strict=True):
            store.put(index, row[: len(conversations[index].token_ids)])
        done += len(batch)
        if report is not None:
            report(done, done + len(pending))
    for hook in hooks:
        hook.remove()
