"""Swaps the linear layers of a sharded model for packed ones with the same results.

For families that `lean_decoder` does not know. Row-parallel layers keep their all-reduce.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dflash_ray.core.memory import return_freed_memory
from dflash_ray.models.packed_linear import PackedLinear


class _RowParallel(nn.Module):
    """A packed shard of a row-parallel layer: partial product, sum over ranks, bias."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self._packed = PackedLinear(linear.weight)
        self._bias = linear.bias
        self._group = linear.mp_group

    def forward(self, x: Tensor) -> Tensor:
        out = summed_over_ranks(self._packed(x), self._group)
        return out if self._bias is None else out + self._bias


def summed_over_ranks(partial: Tensor, group: Any) -> Tensor:
    """The sum of the group's partial products; the group is a LinearAllreduce's, None for one rank."""
    if group is None:
        return partial
    from deepspeed import comm

    partial = partial.contiguous()
    comm.inference_all_reduce(partial, group=group)
    return partial


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer of torch or of DeepSpeed's tensor parallelism."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("LinearLayer", "LinearAllreduce")


def pack_linears(model: nn.Module) -> None:
    """Replaces linear layers in place; on CPU only, where it pays."""
    for parent in list(model.modules()):
        names = [name for name, child in parent.named_children() if is_linear(child)]
        for name in names:
            setattr(parent, name, _packed(getattr(parent, name)))
        if names:
            return_freed_memory()  # or loading would take the layers' memory twice


def _packed(linear: Any) -> nn.Module:
    if type(linear).__name__ == "LinearAllreduce":
        return _RowParallel(linear)
    return PackedLinear(linear.weight, linear.bias)
