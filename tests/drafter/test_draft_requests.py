"""How a request draws reaches the drafter that draws with it, and its draft distribution comes back."""

from dataclasses import astuple

import numpy as np
import pytest
import torch

from dflash_ray.config import load_config
from dflash_ray.core.draft_blocks import BlockColumns, DraftBlock
from dflash_ray.drafter.rows import Rows
from dflash_ray.drafter.sessions import DraftSessions, Draws, Proposals
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.context_features import pack
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.drafter_checkpoint import load_drafter
from dflash_ray.pb import common_pb2
from tests.drafter.published import HIDDEN, VALUES, dflash2, save_random
from tests.toy import token_request
from tests.unit.router.scenes import Scene


def drafts_of_two(
    drafter: BlockDrafter, rows: torch.Tensor, draws: tuple[Draw, Draw], tree_width: int = 1
) -> list[DraftBlock]:
    """Blocks of two sequences with the same context that draw differently."""
    sessions = DraftSessions(drafter, 1000)
    columns = np.array([[4, 9, 9], [0, 0, 2], [len(rows), 2, len(rows) - 2]])
    packed = pack(torch.cat([rows, rows]))
    assert not sessions.extend([Rows.of(*columns, packed)])
    both = np.ones(2, dtype=np.int64)
    drawing = Draws(*(np.array(column) for column in zip(*map(astuple, draws), strict=True)))
    ids = np.array([4, 9])
    message, faults = sessions.propose(
        Proposals(ids, ids, (len(rows) + 1) * both, 11 * both, 5 * both, drawing), tree_width, epoch=1
    )
    assert not faults
    blocks = BlockColumns.of(message)
    return [blocks.block(0), blocks.block(1)]


def test_the_router_sends_each_sequences_temperature_and_seed():
    scene = Scene("router.tree_width=2", "router.prefer_ngram=false", drafters=("d",))
    rejection = common_pb2.VERIFY_MODE_REJECTION
    for temperature, seed, mode in ((0.0, 3, 0), (0.5, 2**64 - 1, rejection)):
        request = token_request([1, 2, 3], max_new=20, draft_tokens=4)
        request.sampling.CopyFrom(common_pb2.SamplingParams(temperature=temperature, seed=seed, mode=mode))
        scene.scheduler.arrive(request, 0.0)
    scene.emitted = {1: [], 2: []}
    scene.finish_step()
    scene.answer("d")
    request = scene.drafters["d"].request
    assert list(request.temperatures) == [0.0, 0.5]
    assert list(request.seeds) == [3, 2**64 - 1]
    assert list(request.wants_distributions) == [False, True]


def test_a_replica_drafts_with_the_temperature_and_seed_it_is_sent(target, tmp_path):
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, dflash2(top_k=8)), target), target)
    rows = torch.randn(6, HIDDEN)
    blocks = drafts_of_two(drafter, rows, (Draw(), Draw(2.0, 77)))
    drafter.open(100)
    drafter.extend_one(100, 0, rows)
    for block, draw in zip(blocks, (Draw(), Draw(2.0, 77)), strict=True):
        expected = drafter.propose([100], [11], [5], 1, [draw])[0]
        assert block.candidate_ids.tolist() == expected.candidate_ids.tolist()
    assert blocks[0].candidate_ids.tolist() != blocks[1].candidate_ids.tolist()


def test_a_replica_returns_the_whole_distribution_of_a_draft_that_it_drew(target, tmp_path):
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, dflash2(top_k=8)), target), target)
    rows = torch.randn(6, HIDDEN)
    drawn, greedy = drafts_of_two(drafter, rows, (Draw(2.0, 77, True), Draw(0.0, 77, True)))
    assert drawn.is_drawn and drawn.candidate_ids.shape == (5, 8)
    assert np.exp(drawn.log_probs).sum(1) == pytest.approx(np.ones(5), abs=1e-5)
    assert not greedy.is_drawn and greedy.candidate_ids.shape == (5, 1)


def test_the_checkpoint_decides_which_method_a_replica_serves(target, tmp_path):
    for name, values in (("dflash", VALUES), ("dflash2", dflash2())):
        drafter = BlockDrafter(load_drafter(save_random(tmp_path / name, values), target), target)
        assert drafter.name == name
        assert load_config(None, [f"drafter.method={name}"]).uses_features


def test_a_replica_drafts_trees_where_they_are_wanted_and_chains_where_a_distribution_is(target, tmp_path):
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, dflash2(top_k=8)), target), target)
    rows = torch.randn(6, HIDDEN)
    draws = (Draw(2.0, 77), Draw(2.0, 77, True))
    tree, drawn = drafts_of_two(drafter, rows, draws, tree_width=3)
    assert drawn.is_drawn and drawn.candidate_ids.shape == (5, 8)
    assert drawn.parents is None or drawn.parents.tolist() == [0, 1, 2, 3, 4]
    assert tree.parents is not None and tree.candidate_ids.shape == (5, 1) and not tree.is_drawn
    assert (tree.parents <= np.arange(5)).all() and np.bincount(tree.parents).max() <= 3
    # The likeliest path is the chain that a drafter of chains would have drafted.
    drafter.open(100)
    drafter.extend_one(100, 0, rows)
    chain = drafter.propose([100], [11], [5], 1, draws[:1])[0].candidate_ids[:, 0].tolist()
    path, at = [], 0
    while (children := np.flatnonzero(tree.parents == at)).size:
        path.append(int(tree.candidate_ids[children[0], 0]))
        at = int(children[0]) + 1
    assert path == chain[: len(path)]


@pytest.mark.parametrize("values", [VALUES, dflash2(top_k=8)], ids=["dflash", "dflash2"])
def test_a_smaller_tree_is_the_beginning_of_a_larger_one(target, tmp_path, values):
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, values), target), target)
    drafter.open(1)
    drafter.extend_one(1, 0, torch.randn(6, HIDDEN))
    large, small = (drafter.propose([1], [11], [count], 1, [Draw()], 4)[0] for count in (12, 5))
    assert large.parents is not None and small.parents is not None
    assert torch.equal(large.parents[:5], small.parents)
    assert torch.equal(large.candidate_ids[:5], small.candidate_ids)
    assert torch.allclose(large.logprobs[:5], small.logprobs)
