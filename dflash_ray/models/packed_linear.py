"""Linear layers for a few rows on CPU: weights laid out once, so that a pass is one stream from memory.

On other devices, and where the operators could not be compiled, the layers are torch's own. Inference only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_ray.kernels import ops


class PackedLinear(nn.Module):
    """y = x W^T + b with x [..., in] and y [..., out].

    Args:
        weight: [out, in]; taken over, the caller should drop its own reference.
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach()
        self.is_packed = ops.is_compiled_for(weight) and weight.numel() > 0
        # A packed weight is neither parameter nor buffer: nothing may move, cast or save it.
        self.weight = torch.ops.dflash_ray.pack_linear(weight) if self.is_packed else weight.contiguous()
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.dflash_ray.packed_linear(x, self.weight, self.bias, self.out_features)
        return out


def fuse(linears: Sequence[nn.Linear]) -> PackedLinear:
    """Layers with the same input as one; the outputs follow each other."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return PackedLinear(weight, torch.cat([bias.detach() for bias in biases]) if biases else None)
