"""What a checkpoint drafts after one context that is always the same."""

import torch

from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.draft_proposals import DraftProposal
from dflash_ray.models.drafter_checkpoint import load_drafter
from tests.drafter.published import HIDDEN, VOCAB


def draft(directory, target) -> DraftProposal:
    drafter = BlockDrafter(load_drafter(directory, target), target)
    drafter.open(1)
    drafter.extend_one(1, 0, torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(1)))
    return drafter.propose([1], [7], [5], VOCAB)[0]


def assert_same_drafts(one, other, target) -> None:
    mine, theirs = draft(one, target), draft(other, target)
    assert torch.equal(mine.candidate_ids, theirs.candidate_ids)
    assert torch.equal(mine.logprobs, theirs.logprobs)
