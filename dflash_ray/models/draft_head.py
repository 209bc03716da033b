"""What a drafter draws its tokens with: a head for its vocabulary, and a DFlash 2 selector that is bound to it."""

from __future__ import annotations

import torch
from torch import Tensor

from dflash_ray.models.dflash import DflashNetwork
from dflash_ray.models.dflash2 import CandidateSelector, FactorisedSelector
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.target_checkpoint import TargetCheckpoint


def build_selector(
    network: DflashNetwork, embedding: Tensor, ids: Tensor | None, head: Tensor
) -> CandidateSelector | None:
    """The network's selector, ready to use; embedding [V, H], head [V_d, H] of the tokens `ids` (None: all)."""
    selector: CandidateSelector | None = getattr(network, "candidate_selector", None)
    dflash2 = network.config.dflash2
    if isinstance(selector, FactorisedSelector) and dflash2 is not None:
        selector.bind(embedding if ids is None else embedding[ids], head)
        return selector.expanded(dflash2)
    return selector


def load_draft_head(
    checkpoint: DrafterCheckpoint, target: TargetCheckpoint, dtype: torch.dtype, device: str
) -> tuple[Tensor | None, Tensor]:
    """Target ids of the draft vocabulary (None: the target's own) and the head's rows for it."""
    head = target.load_head(dtype) if checkpoint.head is None else checkpoint.head.to(dtype)
    ids = checkpoint.draft_ids
    if ids is None:
        return None, head.to(device)
    if len(head) != len(ids):  # a head for the whole vocabulary
        head = head[ids].contiguous()
    return ids.to(device), head.to(device)
