"""Output shapes of the operators for tracing: their implementations on the Meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dflash_ray.kernels.columns import NUM_BINS, CommitColumn, OutcomeColumn, Partial, StateColumn


def _table(like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty((like.shape[0], columns), dtype=dtype)


def _unsharded_columns(num_candidates: int) -> int:
    return Partial.MASS + 1 + num_candidates if num_candidates else Partial.MASS


_VERIFY: dict[str, Callable[..., Tensor | None]] = {
    "verify_prepare": lambda logits, *_: _table(logits, 2, torch.float64),
    "threshold_start": lambda maxima, *_: _table(maxima, len(StateColumn), torch.int64),
    "threshold_histogram": lambda logits, *_: _table(logits, NUM_BINS, torch.int64),
    "threshold_narrow": lambda *_: None,
    "verify_greedy": lambda logits, *_: _table(logits, Partial.MASS, torch.float64),
    "verify_coupled": lambda logits, *_: _table(logits, Partial.MASS, torch.float64),
    "verify_rejection": lambda logits, *rest: _table(logits, Partial.MASS + 1 + rest[-1].shape[1], torch.float64),
    "verify_unsharded": lambda logits, *rest: _table(logits, _unsharded_columns(rest[6].shape[1]), torch.float64),
    "verify_combine": lambda partials, rows, ints, *rest: _table(
        ints, OutcomeColumn.TOKENS + 2 * rest[-1], torch.int64
    ),
    "commit": lambda outcome, *_: _table(outcome, len(CommitColumn), torch.int64),
    "token_logprobs": lambda logits, start, chosen, num_top: _table(logits, 3 + 2 * num_top, torch.float64),
    "gumbel_noise": lambda seeds, positions, ids, purpose: torch.empty_like(ids, dtype=torch.float64),
}


def _packed_linear(x: Tensor, packed: Tensor, bias: Any, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _choose_drafts(hidden: Tensor, weights: Any, anchors: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (_, slots, candidates), wants_scores = rest[3], rest[5]
    ids = anchors.new_empty((len(anchors), slots, candidates))
    scores = hidden.new_empty((len(anchors) if wants_scores else 0, slots, candidates, candidates))
    return ids, hidden.new_empty(ids.shape), torch.empty_like(ids), scores


def register_verify_fakes(namespace: str) -> None:
    """For the verification operators of a torch.ops namespace."""
    for name, function in _VERIFY.items():
        torch.library.register_fake(f"{namespace}::{name}", function)


def register_layer_fakes(namespace: str) -> None:
    """For the operators between a layer's products of a torch.ops namespace."""
    register = torch.library.register_fake
    register(f"{namespace}::add_norm", lambda hidden, *_: torch.empty_like(hidden))
    register(f"{namespace}::turn_and_store", lambda *_: None)
    register(f"{namespace}::convolve", lambda x, *_: torch.empty_like(x))
    register(f"{namespace}::activate", lambda gate_up, *_: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2))


def register_draft_fakes(namespace: str) -> None:
    """For the operators that choose a drafter's candidates in a torch.ops namespace."""
    register = torch.library.register_fake
    register(
        f"{namespace}::top_candidates",
        lambda logits, count: logits.new_empty((len(logits), count), dtype=torch.int64),
    )
    register(
        f"{namespace}::walk_candidates",
        lambda scores, ids, *_: (torch.empty_like(ids), scores.new_empty(ids.shape)),
    )


def register_attention_fake(namespace: str) -> None:
    """For attention over pages in a torch.ops namespace."""
    torch.library.register_fake(f"{namespace}::attend_pages", lambda query, *_: query.new_empty(query.shape))


def register_forward_fakes() -> None:
    """For the operators of the forward pass whose outputs have the shape of an input."""
    torch.library.register_fake("dflash_ray::packed_linear", _packed_linear)
    torch.library.register_fake("dflash_ray::count_history", lambda *_: None)
    torch.library.register_fake("dflash_ray::rms_norm", lambda x, weight, eps: torch.empty_like(x))
    torch.library.register_fake("dflash_ray::paged_attention", lambda query, *_: torch.empty_like(query))
    torch.library.register_fake("dflash_ray::move_rows", lambda *_: None)
    torch.library.register_fake("dflash_ray::store_context", lambda *_: None)
    torch.library.register_fake("dflash_ray::choose_drafts", _choose_drafts)
    torch.library.register_fake("dflash_ray::decoder_layers", lambda hidden, *_: None)
    torch.library.register_fake("dflash_ray::decoder_attention", lambda hidden, *_: torch.empty_like(hidden))
    torch.library.register_fake("dflash_ray::decoder_mlp", lambda hidden, *_: torch.empty_like(hidden))
