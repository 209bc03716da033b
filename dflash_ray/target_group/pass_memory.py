"""What passes of fixed shapes take of a GPU: their buffers, and the memory that their graphs share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dflash_ray.models import draft_passes
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.pass_buffers import PassBuffers, room_of


def target_pass_bytes(model: RankModel, shapes: Sequence[int], page_size: int, rank_vocab_size: int) -> int:
    """Of passes of these numbers of rows.

    Graphs run one after the other and share their memory, of which the largest pass takes most: attention's sums over
    the longest context, and logits.
    """
    if not model.has_fixed_passes:
        return 0
    sums = room_of(shapes[-1], model.max_model_len, page_size).sums_bytes(model.heads, model.head_dim)
    logits = shapes[-1] * rank_vocab_size * model.dtype.itemsize
    return sum(PassBuffers.num_bytes(rows, model, page_size) for rows in shapes) + sums + logits


def draft_pass_bytes(
    checkpoint: DrafterCheckpoint, dtype: torch.dtype, vocab_size: int, max_model_len: int, max_sequences: int
) -> int:
    """Of a drafter's passes for so many sequences at a time, whose contexts may all be as long as can be."""
    ids, config = checkpoint.draft_ids, checkpoint.config
    num_tokens = vocab_size if ids is None else len(ids)
    return draft_passes.num_bytes(config, num_tokens, max_model_len + config.block_size, max_sequences, dtype)
