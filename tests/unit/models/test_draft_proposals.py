"""Proposals of many sequences as they go on."""

import torch

from dflash_ray.core.arrays import column
from dflash_ray.core.draft_blocks import BlockColumns
from dflash_ray.models.draft_proposals import DraftProposal, DraftProposals


def proposal(shape: tuple[int, int], parents: list[int] | None = None, is_drawn: bool = False) -> DraftProposal:
    ids = torch.arange(shape[0] * shape[1]).reshape(shape)
    return DraftProposal(ids, -ids.float(), is_drawn, None if parents is None else torch.tensor(parents))


def test_trees_and_chains_of_one_pass_arrive_as_they_were_proposed():
    made = [proposal((4, 1), [0, 0, 1, 1]), proposal((2, 3), is_drawn=True), proposal((3, 1), [0, 1, 0])]
    proposals = DraftProposals.of(made)
    message = proposals.blocks(column([5, 6, 7]), column([10, 11, 12])).message(3)
    blocks = list(BlockColumns.of(message))
    assert [block.parents.tolist() for block in blocks] == [[0, 0, 1, 1], [0, 1], [0, 1, 0]]
    for one, kept, block in zip(made, proposals, blocks, strict=True):
        assert block.candidate_ids.tolist() == kept.candidate_ids.tolist() == one.candidate_ids.tolist()
        assert block.log_probs.tolist() == kept.logprobs.tolist() == one.logprobs.tolist()
        assert block.is_drawn == kept.is_drawn == one.is_drawn
        assert block.parents.tolist() == kept.parents.tolist()


def test_chains_alone_carry_no_parents():
    proposals = DraftProposals.of([proposal((2, 1)), proposal((3, 1))])
    columns = proposals.blocks(column([5, 6]), column([10, 11]))
    assert proposals.parents is None and not len(columns.parents)
    assert [block.parents for block in BlockColumns.of(columns.message(1))] == [None, None]
