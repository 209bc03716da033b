"""The decoder layers of the families related to Llama on a device of which a layer is nine operators.

One product for q, k and v, one for gate and up; what stands between the products is `kernels/layer_ops.py`. A norm
takes along the sum that it is of, so a sublayer's output is added by the norm that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_ray.kernels import layer_ops
from dflash_ray.kernels.attention import StepAttention
from dflash_ray.models.target_logits import norm_weight
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.decoder_parts import LayerParts, RotaryTable, decoder_shape, embedding_scale, layer_parts
from dflash_ray.target_group.linears import summed_over_ranks
from dflash_ray.target_group.paged_cache import PagedCache


class Layout(Protocol):
    """Where the T rows of a pass go and what they see: slots int64 [T] on the device, a planned attention."""

    @property
    def cache(self) -> PagedCache: ...

    @property
    def slots(self) -> Tensor: ...

    @property
    def attention(self) -> StepAttention: ...


class DeviceDecoder:
    """Embedding, layers and final norm of one rank. Takes the layers' weights over and leaves the modules empty.

    Args:
        tap_layer_ids: layers whose outputs are wanted, in order of concatenation.
    """

    def __init__(self, base: Any, device: str, tap_layer_ids: Sequence[int]) -> None:
        self._device = device
        self._shape = decoder_shape(base)
        self._embedding = base.embed_tokens.weight.detach().to(device)
        self._embedding_scale = embedding_scale(base)
        self._turns = RotaryTable(base.rotary_emb, device)
        self._norm = norm_weight(base.norm).detach().to(device)
        self._layers = []
        for index in range(len(base.layers)):
            self._layers.append(layer_parts(base.layers[index]).to(device))
            base.layers[index] = nn.Identity()
        self._tap_layer_ids = list(tap_layer_ids)

    def __call__(self, batch: StepBatch, step: Layout) -> tuple[Tensor, Tensor | None]:
        """Normed rows [T, H], and the taps [F, taps * H] of the feature rows if there are any."""
        cos, sin = self._turns(batch.positions)
        token_ids, feature_rows = (
            torch.from_numpy(column).to(self._device) for column in (batch.token_ids, batch.feature_rows)
        )
        return self.run(token_ids, cos, sin, step, feature_rows if len(feature_rows) else None)

    def turns(self, num_positions: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of all positions below a number, as `RotaryTable.whole`."""
        return self._turns.whole(num_positions)

    def run(
        self, token_ids: Tensor, cos: Tensor, sin: Tensor, step: Layout, tap_rows: Tensor | slice | None
    ) -> tuple[Tensor, Tensor | None]:
        """The pass over what is on the device: token_ids int64 [T], cos and sin [T, d]. Waits for nothing.

        Args:
            tap_rows: rows whose taps are wanted, a slice for all of them; None for none.
        """
        hidden = F.embedding(token_ids, self._embedding)
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        rows = tap_rows if self._tap_layer_ids else None
        taps: dict[int, Tensor] = {}
        delta = after = None
        for index, layer in enumerate(self._layers):
            normed = self._add_norm(hidden, delta, after, layer.input_norm)
            if rows is not None and index - 1 in self._tap_layer_ids:
                taps[index - 1] = _copied(hidden, rows)
            delta = self._attention(index, layer, normed, cos, sin, step)
            normed = self._add_norm(hidden, delta, layer.after_attention_norm, layer.mlp_norm)
            activated = layer_ops.activate(F.linear(normed, layer.gate_up), self._shape.is_gelu)
            delta = summed_over_ranks(F.linear(activated, layer.down), layer.group)
            after = layer.after_mlp_norm
        normed = self._add_norm(hidden, delta, after, self._norm)
        if rows is None:
            return normed, None
        taps[len(self._layers) - 1] = _copied(hidden, rows)
        return normed, torch.cat([taps[index] for index in self._tap_layer_ids], dim=-1)

    def _add_norm(self, hidden: Tensor, delta: Tensor | None, after: Tensor | None, weight: Tensor) -> Tensor:
        return layer_ops.add_norm(hidden, delta, after, weight, self._shape.eps, self._shape.residual_scale)

    def _attention(
        self, index: int, layer: LayerParts, normed: Tensor, cos: Tensor, sin: Tensor, step: Layout
    ) -> Tensor:
        """The attention sublayer's output [T, H], summed over the ranks."""
        shape = self._shape
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
        keys, values = step.cache.keys[index], step.cache.values[index]
        layer_ops.turn_and_store(qkv, layer.q_norm, layer.k_norm, cos, sin, step.slots, keys, values, shape.eps)
        queries = qkv[:, : shape.heads * shape.head_dim].unflatten(-1, (shape.heads, shape.head_dim))
        attended = step.attention.attend(
            queries, None, None, keys, values, shape.scale, layer.window, shape.softcap
        ).flatten(1)
        if layer.group is None:
            return F.linear(attended, layer.output, layer.output_bias)
        out = summed_over_ranks(F.linear(attended, layer.output), layer.group)
        return out if layer.output_bias is None else out + layer.output_bias


def _copied(hidden: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows as they are now: the next norm adds to them in place."""
    return hidden[rows].clone() if isinstance(rows, slice) else hidden[rows]
