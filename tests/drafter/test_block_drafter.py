"""Sessions of a drafter: contexts that come in pieces, drafts side by side, room that runs out."""

import pytest
import torch

from dflash_ray.models.block_drafter import BlockDrafter, ContextGap
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint, load_drafter
from tests.drafter.published import BLOCK, HIDDEN, VALUES, VOCAB, changed, dflash2, save_random, sliding


@pytest.fixture(scope="module")
def checkpoint(target, tmp_path_factory) -> DrafterCheckpoint:
    return load_drafter(save_random(tmp_path_factory.mktemp("drafter"), VALUES), target)


def test_context_that_comes_in_pieces_or_twice_is_the_same_context(checkpoint, target):
    drafter = BlockDrafter(checkpoint, target)
    features = torch.randn(30, HIDDEN)
    drafter.open(1)
    drafter.open(2)
    drafter.extend_one(1, 0, features)
    for start, stop in ((0, 7), (5, 8), (8, 8), (8, 29), (0, 30)):
        drafter.extend_one(2, start, features[start:stop])
    one, other = drafter.propose([1, 2], [3, 3], [5, 5], num_candidates=2)
    assert torch.allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_sequences_drafted_together_get_the_drafts_they_get_alone(checkpoint, target):
    drafter = BlockDrafter(checkpoint, target)
    for session, rows in ((1, 5), (2, 19), (3, 300)):
        drafter.open(session)
        drafter.extend_one(session, 0, torch.randn(rows, HIDDEN))
    together = drafter.propose([1, 2, 3], [4, 5, 6], [5, 2, 3], num_candidates=1)
    for session, anchor, count, proposal in zip((1, 2, 3), (4, 5, 6), (5, 2, 3), together, strict=True):
        alone = drafter.propose([session], [anchor], [count], num_candidates=1)[0]
        assert torch.equal(alone.candidate_ids, proposal.candidate_ids)
        assert proposal.candidate_ids.shape == (count, 1)


def test_rows_that_were_worked_on_ahead_leave_nothing_to_do_and_give_the_same_drafts(checkpoint, target, monkeypatch):
    ahead, late = (BlockDrafter(checkpoint, target) for _ in range(2))
    features = torch.randn(24, HIDDEN)
    for drafter in (ahead, late):
        drafter.open(1)
        for start, stop in ((0, 21), (21, 24)):
            drafter.extend_one(1, start, features[start:stop])
            if drafter is ahead:
                drafter.catch_up()
    wanted = late.propose([1], [3], [5], num_candidates=2)[0]
    monkeypatch.setattr(ahead, "_context_passes", None)
    monkeypatch.setattr(ahead, "_projection", None)
    got = ahead.propose([1], [3], [5], num_candidates=2)[0]
    assert torch.equal(got.candidate_ids, wanted.candidate_ids) and torch.equal(got.logprobs, wanted.logprobs)


def drafts_and_rows(checkpoint, target, count, monkeypatch):
    """`count` drafts for each of two sequences, and the rows of the blocks that they were computed in."""
    drafter = BlockDrafter(checkpoint, target)
    rows = []
    reserve = drafter._pages.reserve_blocks
    monkeypatch.setattr(drafter._pages, "reserve_blocks", lambda *blocks: rows.append(blocks[-1]) or reserve(*blocks))
    for session, length in ((1, 5), (2, 19)):
        drafter.open(session)
        drafter.extend_one(session, 0, torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(session)))
    return drafter.propose([1, 2], [4, 5], [count, count], num_candidates=3), rows[0]


CAUSAL = {"full": changed(is_causal=True), "sliding": sliding("sliding", "sliding"), "dflash2": dflash2(is_causal=True)}


@pytest.mark.parametrize("values", CAUSAL.values(), ids=CAUSAL.keys())
def test_a_causal_block_has_the_slots_asked_for_and_the_drafts_of_a_whole_one(values, target, tmp_path, monkeypatch):
    checkpoint = load_drafter(save_random(tmp_path, values), target)
    whole, _ = drafts_and_rows(checkpoint, target, BLOCK - 1, monkeypatch)
    short, rows = drafts_and_rows(checkpoint, target, 2, monkeypatch)
    assert rows == 3
    for one, other in zip(whole, short, strict=True):
        assert torch.equal(one.candidate_ids[:2], other.candidate_ids)
        torch.testing.assert_close(one.logprobs[:2], other.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [VALUES, sliding("sliding", "full")], ids=["bidirectional", "one layer of two"])
def test_a_block_whose_later_slots_are_seen_keeps_its_trained_size(values, target, tmp_path, monkeypatch):
    checkpoint = load_drafter(save_random(tmp_path, values), target)
    assert drafts_and_rows(checkpoint, target, 2, monkeypatch)[1] == BLOCK


def test_a_gap_in_the_context_is_reported_with_what_is_held(checkpoint, target):
    drafter = BlockDrafter(checkpoint, target)
    drafter.open(1)
    drafter.extend_one(1, 0, torch.randn(4, HIDDEN))
    with pytest.raises(ContextGap) as raised:
        drafter.extend_one(1, 6, torch.randn(1, HIDDEN))
    assert raised.value.have == 4


def test_a_text_longer_than_the_drafter_was_trained_for_is_drafted_up_to_the_targets_length(target, tmp_path):
    short = load_drafter(save_random(tmp_path, VALUES | {"max_position_embeddings": 16}), target)
    drafter = BlockDrafter(short, target)
    drafter.open(1)
    drafter.extend_one(1, 0, torch.randn(target.config.max_position_embeddings - 1, HIDDEN))
    assert drafter.propose([1], [4], [5], num_candidates=1)[0].candidate_ids.max() < VOCAB
