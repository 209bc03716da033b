"""Swaps a sharded model's linear layers and norms for leaner ones with the same results.

At a few rows a CPU pass costs the reading of the weights, so layers with one input become one product over weights that
were laid out once. Row-parallel layers keep their all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from dflash_ray.kernels import ops
from dflash_ray.models.packed_linear import PackedLinear

_FUSED = ("q_proj", "k_proj", "v_proj")
_SILU_MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")
_PLAIN_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")


class _FusedFirst(nn.Module):
    """The first of several layers with one input: computes all of them and hands the rest to its siblings."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        self._packed = _pack(linears)
        self._sizes = [linear.weight.shape[0] for linear in linears]
        self.input: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.input = x
        self.parts = self._packed(x).split(self._sizes, dim=-1)
        return self.parts[0]


class _FusedNext(nn.Module):
    """A sibling of _FusedFirst, called after it with the same input."""

    def __init__(self, first: _FusedFirst, index: int) -> None:
        super().__init__()
        self._first = [first]  # in a list, so that the module tree does not hold it twice
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        first = self._first[0]
        assert first.input is x, "fused projections must be called in order with one input"
        return first.parts[self._index]


class _RowParallel(nn.Module):
    """A packed shard of a row-parallel layer: partial product, sum over ranks, bias."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self._packed = PackedLinear(linear.weight)
        self._bias = linear.bias
        self._group = linear.mp_group

    def forward(self, x: Tensor) -> Tensor:
        out = self._packed(x)
        if self._group is not None:
            from deepspeed import comm

            out = out.contiguous()
            comm.inference_all_reduce(out, group=self._group)
        return out if self._bias is None else out + self._bias


class _RmsNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self._eps = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self._eps)


class _SiluMlp(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self._gate_up = _pack([mlp.gate_proj, mlp.up_proj])
        self._down = _swapped(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self._down(ops.silu_and_mul(self._gate_up(x)))


def _pack(linears: list[nn.Module]) -> PackedLinear:
    biases = [linear.bias for linear in linears if getattr(linear, "bias", None) is not None]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return PackedLinear(weight, torch.cat(biases) if biases else None)


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("LinearLayer", "LinearAllreduce")


def _swapped(linear: nn.Module) -> nn.Module:
    return _RowParallel(linear) if type(linear).__name__ == "LinearAllreduce" else _pack([linear])


def lean(model: nn.Module) -> None:
    """Replaces layers in place; on CPU only, where it pays."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in _SILU_MLPS and isinstance(child.act_fn, nn.SiLU | SiLUActivation):
                setattr(parent, name, _SiluMlp(child))
            elif type(child).__name__ in _PLAIN_NORMS:
                setattr(parent, name, _RmsNorm(child))
        linears = [getattr(parent, name, None) for name in _FUSED]
        if all(_is_linear(linear) for linear in linears):
            _fuse(parent, linears)
        for name, child in list(parent.named_children()):
            if _is_linear(child):
                setattr(parent, name, _swapped(child))


def _fuse(parent: nn.Module, linears: list[Any]) -> None:
    has_bias = {linear.bias is not None for linear in linears}
    if len(has_bias) > 1 or any(type(linear).__name__ == "LinearAllreduce" for linear in linears):
        return
    first = _FusedFirst(linears)
    setattr(parent, _FUSED[0], first)
    for index, name in enumerate(_FUSED[1:], start=1):
        setattr(parent, name, _FusedNext(first, index))
