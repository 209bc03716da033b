"""Blocks in passes of fixed numbers, as devices run them, are those of the pass that a CPU makes for each number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dflash_ray.kernels.graphs import Graphs
from dflash_ray.models import block_drafter
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.draft_layers import DeviceLayers
from dflash_ray.models.draft_passes import DraftPasses
from dflash_ray.models.drafter_checkpoint import load_drafter
from tests.drafter.published import HIDDEN, changed, dflash2, save_random


def drafts(drafter: BlockDrafter, lens: list[int]):
    """Proposals for sessions of contexts of these lengths, all together."""
    for session, length in enumerate(lens):
        features = torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(session))
        drafter.open(session)
        drafter.extend_one(session, 0, features)
    return drafter.propose(list(range(len(lens))), [7] * len(lens), [5] * len(lens), 2)


@pytest.mark.parametrize("values", [changed(), dflash2()], ids=["dflash", "dflash2"])
@pytest.mark.parametrize("lens", [[5], [9, 2, 130], [1 + 7 * n % 60 for n in range(67)]], ids=["1", "3", "67"])
def test_drafts_do_not_depend_on_how_many_blocks_a_pass_has(values, lens, target, tmp_path, monkeypatch):
    path = save_random(tmp_path, values)
    wanted = drafts(BlockDrafter(load_drafter(path, target), target), lens)
    monkeypatch.setattr(block_drafter, "draft_layers", DeviceLayers)
    got = drafts(BlockDrafter(load_drafter(path, target), target), lens)
    np.testing.assert_array_equal(got.candidate_ids, wanted.candidate_ids)
    np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-4)


def test_a_pass_is_of_the_smallest_number_of_blocks_that_hold_it_and_stays_where_it_is(target, tmp_path, monkeypatch):
    monkeypatch.setattr(block_drafter, "draft_layers", DeviceLayers)
    passes = []
    run = DraftPasses._pass

    def counted(self, buffers, reach, pages):
        passes.append((len(buffers.seeds), buffers._chosen.data_ptr(), buffers.slots.data_ptr()))
        run(self, buffers, reach, pages)

    monkeypatch.setattr(DraftPasses, "_pass", counted)
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, changed()), target), target)
    for count in (3, 4, 1, 4, 70):
        drafts(drafter, [6] * count)
    assert [blocks for blocks, *_ in passes] == [4, 4, 1, 4, 64, 8]
    assert passes[0] == passes[1] == passes[3]


@pytest.mark.gpu
def test_a_replayed_draft_is_the_draft_as_it_runs_to_the_bit(target, tmp_path):
    path = save_random(tmp_path, dflash2())
    drafter = BlockDrafter(load_drafter(path, target), target, "cuda", torch.bfloat16)
    lens = [5, 40, 300]
    replayed = drafts(drafter, lens)
    assert len(drafter._passes._graphs) == 1
    drafter._passes._graphs.capture = lambda *_: None
    drafter._passes._graphs._graphs.clear()
    eager = drafts(drafter, lens)
    assert isinstance(drafter._passes._graphs, Graphs)
    np.testing.assert_array_equal(replayed.candidate_ids, eager.candidate_ids)
    np.testing.assert_array_equal(replayed.logprobs, eager.logprobs)
