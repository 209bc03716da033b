"""The colocated drafter's trees get branches from the committed tokens of their slots."""

from __future__ import annotations

import numpy as np
import torch

from dflash_ray.models.draft_proposals import DraftProposal, DraftProposals
from dflash_ray.target_group.branches import Branches
from dflash_ray.target_group.slots import SlotTable
from tests.steps import opening

REPEATED, NEW = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def proposal(parents: list[int] | None, is_drawn: bool = False) -> DraftProposal:
    """27 with 28 behind it."""
    chances = torch.tensor([[0.6], [0.5]]).log()
    return DraftProposal(
        torch.tensor([[27], [28]]), chances, is_drawn, None if parents is None else torch.tensor(parents)
    )


def added(branches: Branches, table: SlotTable, slots: list[int], proposals: list[DraftProposal]) -> DraftProposals:
    most = np.full(len(slots), 6)
    return branches.add(table, np.array(slots), DraftProposals.of(proposals), most)


def test_trees_get_branches_where_the_text_repeats_itself_and_drawn_chains_none():
    table = SlotTable(64, 16, 4)
    repeated, drawn, new = (table.open(opening(at, text)) for at, text in enumerate((REPEATED, REPEATED, NEW)))
    proposals = [proposal([0, 1]), proposal(None, True), proposal([0, 1])]
    found = list(added(Branches(), table, [repeated, drawn, new], proposals))
    assert [len(one.candidate_ids) for one in found] == [6, 2, 2]
    assert set(found[0].candidate_ids[:, 0].tolist()) >= {4, 5, 6, 27}
    for before, after in zip(proposals[1:], found[1:], strict=True):
        assert torch.equal(before.candidate_ids, after.candidate_ids)
        assert torch.allclose(before.logprobs, after.logprobs)


def test_chains_stay_as_they_are():
    table, proposals = SlotTable(64, 16, 4), DraftProposals.of([proposal(None)])
    slot = table.open(opening(0, REPEATED))
    assert Branches().add(table, np.array([slot]), proposals, np.array([6])) is proposals


def test_a_slot_of_another_sequence_and_a_table_that_has_grown_are_looked_up_anew():
    table, branches = SlotTable(64, 16, 1), Branches()
    slot = table.open(opening(0, REPEATED))
    assert len(added(branches, table, [slot], [proposal([0, 1])])[0].candidate_ids) == 6
    branches.clear([slot])
    table.close(0)
    assert table.open(opening(1, NEW)) == slot
    assert len(added(branches, table, [slot], [proposal([0, 1])])[0].candidate_ids) == 2
    grown = table.open(opening(2, REPEATED))
    found = added(branches, table, [slot, grown], [proposal([0, 1])] * 2)
    assert [len(one.candidate_ids) for one in found] == [2, 6]
