"""Runs a checkpoint through the published reference and through BlockDrafter, step by step, and compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.drafter_checkpoint import load_drafter
from dflash_ray.models.target_checkpoint import TargetCheckpoint
from dflash_ray.sampling.noise import gumbel
from tests.drafter.published import MASK, VOCAB

TOLERANCE = 1e-4
STEPS = (11, 1, 4, 6, 2)  # context rows that come before each draft


def load_reference(directory: Path) -> Any:
    from dflash import model as reference

    config = reference.Qwen3Config.from_pretrained(directory)
    kind = getattr(reference, config.architectures[0])
    return kind.from_pretrained(directory, config=config, dtype=torch.float32, attn_implementation="sdpa").eval()


def layer_outputs(model: Any, token_ids: Tensor, layer_ids: tuple[int, ...]) -> Tensor:
    """What the named decoder layers return for a text, side by side: [T, F*H]."""
    taps: dict[int, Tensor] = {}
    hooks = [
        model.model.layers[layer].register_forward_hook(lambda _m, _a, out, layer=layer: taps.__setitem__(layer, out))
        for layer in set(layer_ids)
    ]
    model(token_ids[None])
    for hook in hooks:
        hook.remove()
    return torch.cat([taps[layer][0] for layer in layer_ids], dim=-1)


@torch.inference_mode()
def assert_parity(directory: Path, target: TargetCheckpoint, draw: Draw | None = None) -> None:
    """Context keys and values, logits and choices of several drafts with cropping in between.

    Raises AssertionError at the first difference above 1e-4.
    """
    from dflash import model as reference

    draw = draw or Draw()
    checkpoint = load_drafter(directory, target)
    theirs, ours = load_reference(directory), BlockDrafter(checkpoint, target)
    config, projector, model = ours.config, checkpoint.build_projector(), target.load_model()
    embedding = model.get_input_embeddings().weight if checkpoint.embedding is None else checkpoint.embedding
    head = model.lm_head if checkpoint.head is None else lambda hidden: F.linear(hidden, checkpoint.head)
    tokens = torch.randint(0, MASK, (sum(STEPS) + 1,), generator=torch.Generator().manual_seed(3))
    hidden_states = model(tokens[None], output_hidden_states=True).hidden_states
    raw = reference.extract_context_feature(hidden_states, theirs.target_layer_ids)
    features = projector(layer_outputs(model, tokens, config.target_layer_ids))
    assert ours.block_size == theirs.block_size
    cache = reference._make_cache(theirs.config)
    ours.open(1)
    start = 0
    for rows in STEPS:
        stop = start + rows
        block = torch.tensor([[int(tokens[stop]), *[MASK] * (ours.block_size - 1)]])
        hidden = theirs(
            target_hidden=raw[:, start:stop],
            noise_embedding=F.embedding(block, embedding) * config.input_embedding_scale,
            position_ids=torch.arange(start, stop + ours.block_size)[None],
            past_key_values=cache,
            use_cache=True,
        )[:, 1:]
        reference._crop_to(cache, stop)
        ours.extend_one(1, start, features[start:stop])
        _compare_context(ours, cache)
        if config.dflash2 is None:
            _compare_logits(ours, theirs.compute_logits(hidden, head)[0], int(tokens[stop]))
        else:
            _compare_choices(ours, theirs, hidden, head, int(tokens[stop]), draw)
        start = stop


def _compare_context(ours: BlockDrafter, cache: Any) -> None:
    ours._take_features()
    held, pages = ours._sessions[1], ours._pages
    rows = pages.rows_of(np.array([1]), np.array([0]), np.array([held.length]))
    for i, layer in enumerate(cache.layers):
        for mine, other in ((pages.keys[i, rows], layer.keys[0]), (pages.values[i, rows], layer.values[0])):
            last = other.transpose(0, 1)  # a sliding layer keeps the last rows only
            assert len(last) and torch.allclose(mine[held.length - len(last) :], last, atol=TOLERANCE)


def _compare_logits(ours: BlockDrafter, logits: Tensor, anchor: int) -> None:
    proposal = ours.propose([1], [anchor], [ours.max_draft_tokens], VOCAB)[0]
    mine = torch.empty_like(logits).scatter_(-1, proposal.candidate_ids, proposal.logprobs)
    assert torch.allclose(mine, logits.log_softmax(-1), atol=TOLERANCE)
    assert torch.equal(proposal.candidate_ids[:, 0], logits.argmax(-1))


def _compare_choices(ours: BlockDrafter, theirs: Any, hidden: Tensor, head: Any, anchor: int, draw: Draw) -> None:
    """The walk and its probabilities. The reference's own draws are replaced by ours, so that its walk is the same."""
    from dflash import model as reference

    proposal = ours.propose([1], [anchor], [ours.max_draft_tokens], VOCAB, [draw])[0]
    chosen = proposal.candidate_ids[:, 0]
    candidates = theirs.compute_logits(hidden, head).topk(theirs.candidate_selector.top_k, sorted=False).indices[0]
    indexes = iter((candidates == chosen[:, None]).nonzero()[:, 1])
    sample, reference._sample_probs = reference._sample_probs, lambda probs: next(indexes)[None]
    try:
        path, ids, probs = theirs.propose(hidden, torch.tensor([anchor]), head, draw.temperature)
    finally:
        reference._sample_probs = sample
    assert torch.equal(path[0], chosen)
    for slot in range(len(chosen)):
        assert sorted(ids[0, slot].tolist()) == sorted(proposal.candidate_ids[slot].tolist())
    if probs is None:
        return
    mine = torch.empty(len(chosen), VOCAB).scatter_(-1, proposal.candidate_ids, proposal.logprobs)
    assert torch.allclose(mine.gather(-1, ids[0]).exp(), probs[0], atol=TOLERANCE)
    for slot, token in enumerate(chosen.tolist()):
        noise = gumbel([draw.seed], [ours.context_len(1) + 1 + slot], ids[:, slot])[0]
        assert ids[0, slot, (probs[0, slot].log() + noise).argmax()] == token
