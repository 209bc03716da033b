"""Drafting from the target's context features with a published checkpoint, of either architecture."""

from __future__ import annotations

import torch

from dflash_ray.config import DflashRayConfig
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target


def load(config: DflashRayConfig) -> BlockDrafter:
    """The drafter of `drafter.path`. Raises ValueError when it does not fit the target."""
    target = resolve_target(config.model.path)
    return BlockDrafter(
        resolve_drafter(config.drafter.path, target),
        target,
        device=config.drafter.device,
        dtype=getattr(torch, config.drafter.dtype),
    )
