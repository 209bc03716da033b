"""How a request draws reaches the drafter that draws with it, and its draft distribution comes back."""

import numpy as np
import pytest
import torch

from dflash_ray.config import load_config
from dflash_ray.core.draft_blocks import DraftBlock
from dflash_ray.drafter.sessions import DraftSessions, Proposal, Rows
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.drafter_checkpoint import load_drafter
from dflash_ray.pb import common_pb2, router_pb2
from dflash_ray.router.actions import RequestDrafts
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.drafting import Drafting
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.sequence import Phase, RouterSequence
from tests.drafter.published import HIDDEN, VALUES, dflash2, save_random


def drafts_of_two(drafter: BlockDrafter, rows: torch.Tensor, draws: tuple[Draw, Draw]) -> list[DraftBlock]:
    """Blocks of two sequences with the same context that draw differently."""
    sessions = DraftSessions(drafter, 1000)
    assert not sessions.extend([Rows((0, 4), 0, [rows]), Rows((0, 9), 0, [rows[:2], rows[2:]])])
    blocks, faults = sessions.propose(
        [
            Proposal((0, sequence_id), len(rows) + 1, 11, 5, draw)
            for sequence_id, draw in zip((4, 9), draws, strict=True)
        ],
        num_candidates=3,
    )
    assert not faults
    return blocks


def test_the_router_sends_each_sequences_temperature_and_seed():
    drafting = Drafting(load_config(None, ["router.num_candidates=2"]))
    drafting.join(DrafterState("d", needs_features=False, max_draft_tokens=5))
    sequences = []
    rejection = common_pb2.VERIFY_MODE_REJECTION
    for i, (temperature, seed, mode) in enumerate(((0.0, 3, 0), (0.5, 2**64 - 1, rejection))):
        request = router_pb2.GenerateTokensRequest(
            prompt_len=3,
            sampling=common_pb2.SamplingParams(temperature=temperature, seed=seed, mode=mode),
            stopping=common_pb2.StoppingParams(max_new_tokens=20),
        )
        sequence = RouterSequence(i, request, [1, 2, 3, 4], 4, wants_features=False, arrived_at=0.0, phase=Phase.DECODE)
        sequence.is_open = True
        drafting.add(sequence)
        sequences.append(sequence)
    (action,) = drafting.request(sequences, TargetLimits(1, 100, 50, 4, 100, 64), step_id=1, now=0.0)
    assert isinstance(action, RequestDrafts)
    assert list(action.request.temperatures) == [0.0, 0.5]
    assert list(action.request.seeds) == [3, 2**64 - 1]
    assert list(action.request.wants_distributions) == [False, True]


def test_a_replica_drafts_with_the_temperature_and_seed_it_is_sent(target, tmp_path):
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, dflash2(top_k=8)), target), target)
    rows = torch.randn(6, HIDDEN)
    blocks = drafts_of_two(drafter, rows, (Draw(), Draw(2.0, 77)))
    drafter.open(100)
    drafter.extend(100, 0, rows)
    for block, draw in zip(blocks, (Draw(), Draw(2.0, 77)), strict=True):
        expected = drafter.propose([100], [11], [5], 3, [draw])[0]
        assert block.candidate_ids.tolist() == expected.candidate_ids.tolist()
    assert blocks[0].candidate_ids.tolist() != blocks[1].candidate_ids.tolist()


def test_a_replica_returns_the_whole_distribution_of_a_draft_that_it_drew(target, tmp_path):
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, dflash2(top_k=8)), target), target)
    rows = torch.randn(6, HIDDEN)
    drawn, greedy = drafts_of_two(drafter, rows, (Draw(2.0, 77, True), Draw(0.0, 77, True)))
    assert drawn.is_drawn and drawn.candidate_ids.shape == (5, 8)
    assert np.exp(drawn.log_probs).sum(1) == pytest.approx(np.ones(5), abs=1e-5)
    assert not greedy.is_drawn and greedy.candidate_ids.shape == (5, 3)


def test_the_checkpoint_decides_which_method_a_replica_serves(target, tmp_path):
    for name, values in (("dflash", VALUES), ("dflash2", dflash2())):
        drafter = BlockDrafter(load_drafter(save_random(tmp_path / name, values), target), target)
        assert drafter.name == name
        assert load_config(None, [f"drafter.method={name}"]).uses_features
