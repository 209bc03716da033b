"""How a request draws reaches the drafter that draws with it, and its draft distribution comes back."""

import numpy as np
import pytest
import torch

from dflash_ray.config import load_config
from dflash_ray.drafter.sessions import DraftSessions
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.drafter_checkpoint import load_drafter
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2
from dflash_ray.router.actions import RequestDrafts
from dflash_ray.router.drafting import DrafterState, Drafting
from dflash_ray.router.sequence import Phase, RouterSequence
from tests.drafter.published import HIDDEN, VALUES, dflash2, save_random


def features(sequence_id: int, rows: torch.Tensor) -> common_pb2.ContextFeatures:
    return common_pb2.ContextFeatures(
        sequence_id=sequence_id,
        start=0,
        num_rows=len(rows),
        dtype=common_pb2.DATA_TYPE_FLOAT32,
        data=rows.numpy().astype(np.float32).tobytes(),
    )


def request_of_two(rows: torch.Tensor, **columns) -> drafter_pb2.DraftRequest:
    """Proposals for two sequences with the same context; `columns` say how they draw."""
    return drafter_pb2.DraftRequest(
        contexts=[features(4, rows), features(9, rows)],
        sequence_ids=[4, 9],
        epochs=[1, 1],
        committed_lens=[7, 7],
        anchor_token_ids=[11, 11],
        num_draft_tokens=[5, 5],
        num_candidates=3,
        **columns,
    )


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
        sequences.append(sequence)
    (action,) = drafting.request(sequences, max_model_len=100, epoch=1, now=0.0)
    assert isinstance(action, RequestDrafts)
    assert list(action.request.temperatures) == [0.0, 0.5]
    assert list(action.request.seeds) == [3, 2**64 - 1]
    assert list(action.request.wants_distributions) == [False, True]


def test_a_replica_drafts_with_the_temperature_and_seed_it_is_sent(target, tmp_path):
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, dflash2(top_k=8)), target), target)
    rows = torch.randn(6, HIDDEN)
    request = request_of_two(rows, temperatures=[0.0, 2.0], seeds=[1, 77], wants_distributions=[False, False])
    reply = DraftSessions(drafter, 1000).answer(0, request)
    drafter.open(100)
    drafter.extend(100, 0, rows)
    for block, draw in zip(reply.blocks, (Draw(), Draw(2.0, 77)), strict=True):
        expected = drafter.propose([100], [11], [5], 3, [draw])[0]
        assert list(block.candidate_ids) == expected.candidate_ids.flatten().tolist()
    assert list(reply.blocks[0].candidate_ids) != list(reply.blocks[1].candidate_ids)


def test_a_replica_returns_the_whole_distribution_of_a_draft_that_it_drew(target, tmp_path):
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, dflash2(top_k=8)), target), target)
    rows = torch.randn(6, HIDDEN)
    request = request_of_two(rows, temperatures=[2.0, 0.0], seeds=[77, 77], wants_distributions=[True, True])
    drawn, greedy = DraftSessions(drafter, 1000).answer(0, request).blocks
    assert drawn.is_drawn and drawn.num_candidates == 8
    assert np.exp(drawn.log_probs).reshape(5, 8).sum(1) == pytest.approx(np.ones(5), abs=1e-5)
    assert not greedy.is_drawn and greedy.num_candidates == 3


def test_the_checkpoint_decides_which_method_a_replica_serves(target, tmp_path):
    for name, values in (("dflash", VALUES), ("dflash2", dflash2())):
        drafter = BlockDrafter(load_drafter(save_random(tmp_path / name, values), target), target)
        assert drafter.name == name
        assert load_config(None, [f"drafter.method={name}"]).uses_features
