"""Linear layers for a few rows on CPU: weights laid out once for oneDNN.

At 1 to 16 rows this reaches the memory limit, which torch's own product does not.
On other devices the layers are plain matrix products. Inference only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PACK_ROWS = 8  # the number of rows that oneDNN lays the weights out for; others work too


class PackedLinear(nn.Module):
    """y = x W^T + b with x [..., in] and y [..., out].

    Args:
        weight: [out, in]; taken over, the caller should drop its own reference.
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and weight.numel() > 0
        if self.is_packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _PACK_ROWS)
        # Opaque layouts are neither parameters nor buffers: nothing may move, cast or save them.
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_packed:
            return F.linear(x, self._weight, self._bias)
        rows = x.reshape(-1, self.in_features)
        out = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return out.view(*x.shape[:-1], self.out_features)


def fuse(linears: Sequence[nn.Linear]) -> PackedLinear:
    """Layers with the same input as one; the outputs follow each other."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return PackedLinear(weight, torch.cat([bias.detach() for bias in biases]) if biases else None)
