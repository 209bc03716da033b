"""This rank's part of the output head, checked at start against what the model makes of the same hidden state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from dflash_ray.models.packed_linear import PackedLinear
from dflash_ray.models.target_logits import logit_factor, soft_cap

_TOLERANCE = 0.02  # of the largest logit; bfloat16 rounds to 0.004, a factor that is left out shows as much more


def own_tokens(vocab_size: int, tp_rank: int, tp_size: int) -> slice:
    """The tokens of a rank: ranges of equal size, of which the last ones may be shorter or empty."""
    per_rank = -(-vocab_size // tp_size)
    start = min(tp_rank * per_rank, vocab_size)
    return slice(start, start + per_rank)


class VocabParallelHead:
    """Logits of the tokens vocab_start, vocab_start + 1, ... of [R, H] normed rows, as [R, Vs].

    Bias, factors (Granite's, Cohere's) and soft caps (Gemma 2's) are the model's. Its output layer has the rows of all
    tokens, or of this rank's alone. Raises ValueError for a model that computes its logits in another way.
    """

    def __init__(self, model: Any, tp_rank: int, tp_size: int, device: str) -> None:
        config = model.config.get_text_config()
        tokens = own_tokens(config.vocab_size, tp_rank, tp_size)
        self.vocab_start = tokens.start
        layer = model.get_output_embeddings()
        self._own = tokens if len(layer.weight) == config.vocab_size else slice(None)
        weight, bias = (_part(tensor, self._own, device) for tensor in (layer.weight, getattr(layer, "bias", None)))
        self._linear = PackedLinear(weight, bias)
        self._factor, self._cap = logit_factor(config), soft_cap(config)
        self._check(model, device)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._linear(hidden)
        if self._factor != 1.0:
            logits = logits * self._factor
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits

    @torch.inference_mode()
    def _check(self, model: Any, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        size = model.config.get_text_config().hidden_size
        hidden = torch.randn(1, 1, size, generator=generator).to(model.dtype)
        try:
            expected = _own_logits(model, hidden)
        except Exception as error:  # what a model does with a hidden state that it did not make is its own affair
            raise ValueError(f"{_refusal(model)}: {error}") from error
        got = self(hidden[0].to(device)).cpu()[0].float()
        if not len(got):
            return  # more ranks than ranges
        difference = (got - expected[self._own].float()).abs().max()
        if not difference <= _TOLERANCE * expected.abs().max().float():
            raise ValueError(f"{_refusal(model)}, which this server does not: they differ by {difference:.3g}")


def _part(tensor: Tensor | None, rows: slice, device: str) -> Any:
    if tensor is None:
        return None
    part = tensor[rows].detach()
    return (part if len(part) == len(tensor) else part.clone()).to(device)


def _own_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [V] that the model makes of [1, 1, H] as its decoder's output, without a pass through the decoder."""
    decoder = model.get_decoder()
    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        logits: Tensor = model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits
        return logits[0, 0]
    finally:
        del decoder.forward


def _refusal(model: Any) -> str:
    return f"model.path: {type(model).__name__} makes its logits in a way of its own"
