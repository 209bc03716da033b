"""A drafter's context rows from features: one product for all layers and sessions, in fixed numbers of rows.

Passes run over memory that stays, as a graph for each number of rows on a GPU. Rows that fill a pass up repeat its
first one, and so write what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dflash_ray.core.arrays import Ints
from dflash_ray.kernels import ops
from dflash_ray.kernels.graphs import Graphs
from dflash_ray.models.context_pages import ContextPages
from dflash_ray.models.dflash import DflashNetwork, apply_rope
from dflash_ray.models.packed_linear import fuse

ROWS = (16, 64, 256, 1024)  # of a pass


class PoolGraphs:
    """Graphs over context pages, each captured when it is first wanted, and anew when the pool has moved as it grew."""

    def __init__(self, device: torch.device, what: str) -> None:
        self._device, self._what = device, what
        self._graphs = Graphs(device)
        self._pool = 0  # where the pages are that were captured

    def launch(self, key: Hashable, run: Callable[[], None], pages: ContextPages) -> None:
        """Launches a function over the pages; captures it first where it was not."""
        if pages.keys.data_ptr() != self._pool:
            self._graphs, self._pool = Graphs(self._device), pages.keys.data_ptr()
        if key not in self._graphs:
            self._graphs.capture({key: run}, self._what)
        self._graphs.launch(key, run)


class ContextProjection:
    """Keys and values of all layers from features, by one product.

    Attributes:
        turns: cos and sin [P, d] of all positions.
        linear: each layer's keys and values; norms: of each layer's keys [layers, 1, d].
    """

    def __init__(self, network: DflashNetwork, turns: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        self._config, self.turns, self._dtype = network.config, turns, dtype
        attentions = [layer.self_attn for layer in network.layers]
        self.linear = fuse([linear for attention in attentions for linear in (attention.k_proj, attention.v_proj)])
        self.norms = torch.stack([attention.k_norm.weight.detach() for attention in attentions])[:, None]

    def __call__(self, positions: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, n, n_kv, d] of features [n, H] of these positions."""
        config = self._config
        heads = (config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        projected = self.linear(features).unflatten(-1, heads)
        cos, sin = (table[positions][:, None, None].to(self._dtype) for table in self.turns)
        keys = apply_rope(self._normed(projected[:, :, 0]), cos, sin)
        return keys.movedim(1, 0), projected[:, :, 1].movedim(1, 0)

    def _normed(self, keys: Tensor) -> Tensor:
        """Keys [n, layers, n_kv, d], each layer's by its norm."""
        return ops.rms_norm(keys, torch.ones_like(self.norms[0, 0]), self._config.rms_norm_eps) * self.norms


class ContextPasses:
    """Features [n, H] to their rows of the pool."""

    def __init__(self, projection: ContextProjection, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._projection, self._width, self._dtype, self._device = projection, width, dtype, device
        self._buffers: dict[int, _Buffers] = {}
        self._graphs = PoolGraphs(device, "context rows")

    @torch.inference_mode()
    def __call__(self, positions: Ints, rows: Ints, features: Tensor, pages: ContextPages) -> None:
        """Stores the context rows of features [n, H] of these positions [n] in rows [n] of the pool."""
        for first in range(0, len(rows), ROWS[-1]):
            cut = slice(first, first + ROWS[-1])
            count = len(rows[cut])
            size = next(size for size in ROWS if size >= count)
            if size not in self._buffers:
                self._buffers[size] = _Buffers(size, self._width, self._dtype, self._device)
            buffers = self._buffers[size]
            buffers.fill(positions[cut], rows[cut], features[cut])
            self._graphs.launch(size, partial(self._pass, buffers, pages), pages)

    def _pass(self, buffers: _Buffers, pages: ContextPages) -> None:
        features = buffers.features.index_select(0, buffers.sources)
        pages.store(buffers.rows, *self._projection(buffers.positions, features))


class _Buffers:
    """Those of a pass of n rows.

    Attributes:
        sources: int64 [n], the row of features [n, H] that each is made of; positions, rows: int64 [n].
    """

    def __init__(self, size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(3, size, dtype=torch.int64, pin_memory=is_cuda)
        self._memory = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event() if is_cuda else None
        self.sources, self.positions, self.rows = self._memory
        self.features = torch.zeros(size, width, dtype=dtype, device=device)

    def fill(self, positions: Ints, rows: Ints, features: Tensor) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        host, count = self._host.numpy(), len(rows)
        host[0] = 0
        host[0, :count] = np.arange(count)
        sources = host[0]
        host[1], host[2] = positions[sources], rows[sources]
        self._memory.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self.features[:count].copy_(features)
