"""Follows answers that the target gave before: what decoding would have accepted, at the cost of the drafter alone.

At temperature 0 the target's tokens do not depend on the drafts, so an answer with its taps holds all that the target
would say to any drafter. The drafter is the one that serves, with its sessions and its context.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.training.decoding import Decoded
from dflash_ray.training.trees import Candidates

_TOGETHER = 32  # answers that are followed in one batch


@dataclass(frozen=True)
class GreedyAnswer:
    """token_ids are prompt and answer, T of them; taps [T - 1, F * H] of the layers that the drafter reads."""

    prompt_len: int
    token_ids: list[int]
    taps: Tensor


@dataclass(slots=True)
class _Followed:
    answer: GreedyAnswer
    features: Tensor
    anchor: int
    is_stopped: bool
    stats: AcceptanceStats
    blocks: list[Candidates] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.answer.token_ids) - 1 - self.anchor


def follow(
    drafter: BlockDrafter,
    projector: nn.Module,
    answers: Sequence[GreedyAnswer],
    stop_ids: Collection[int],
    num_draft_tokens: int,
    num_candidates: int,
) -> Iterator[Decoded]:
    """What decoding each answer with `num_draft_tokens` drafts a pass would have shown, in the order of the answers.

    Args:
        stop_ids: an answer that ends with none of them was cut off by its limit of tokens.
        num_candidates: of each slot that are kept in the blocks; 0 for no blocks.
    """
    for start in range(0, len(answers), _TOGETHER):
        together = [
            _begin(projector, answer, stop_ids, num_draft_tokens) for answer in answers[start : start + _TOGETHER]
        ]
        _run(drafter, together, num_draft_tokens, num_candidates)
        for one in together:
            yield Decoded(one.answer.token_ids[one.answer.prompt_len :], None, one.stats, one.is_stopped, one.blocks)


@torch.inference_mode()
def _begin(projector: nn.Module, answer: GreedyAnswer, stop_ids: Collection[int], num_draft_tokens: int) -> _Followed:
    features = projector(answer.taps.float())
    is_stopped = answer.token_ids[-1] in stop_ids
    return _Followed(answer, features, answer.prompt_len, is_stopped, AcceptanceStats(num_draft_tokens))


def _run(drafter: BlockDrafter, together: list[_Followed], num_draft_tokens: int, num_candidates: int) -> None:
    """Drafts in rounds until every answer is at its end."""
    for session in range(len(together)):
        drafter.open(session)
    while active := [(session, one) for session, one in enumerate(together) if one.num_left > 0]:
        for session, one in active:
            held = drafter.context_len(session)
            drafter.extend_one(session, held, one.features[held : one.anchor])
        proposals = drafter.propose(
            [session for session, _ in active],
            [one.answer.token_ids[one.anchor] for _, one in active],
            [num_draft_tokens] * len(active),
            max(1, num_candidates),
        )
        for (_, one), proposal in zip(active, proposals, strict=True):
            block = Candidates(one.anchor + 1, proposal.candidate_ids.numpy(), proposal.logprobs.numpy())
            _take(one, block)
            if num_candidates:
                one.blocks.append(block)
    for session in range(len(together)):
        drafter.close(session)


def _take(one: _Followed, block: Candidates) -> None:
    """Accepts the drafts that the answer goes on with, and moves the anchor to the target's own token after them."""
    drafts = block.ids[:, 0]
    if not one.is_stopped:  # the last token within the limit is the target's own
        drafts = drafts[: one.num_left - 1]
    truth = one.answer.token_ids[block.committed_len :]
    accepted = 0
    while accepted < min(len(drafts), len(truth)) and drafts[accepted] == truth[accepted]:
        accepted += 1
    one.stats.record(len(drafts), accepted)
    one.anchor += accepted + 1
