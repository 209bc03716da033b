"""Drafts equal those of the published reference for every kind of checkpoint."""

import pytest
import torch

from dflash_ray.models import block_drafter
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.dflash import DflashNetwork
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_layers import DeviceLayers
from dflash_ray.models.drafter_checkpoint import load_drafter, save_drafter
from dflash_ray.models.drafter_config import parse_dflash_config
from tests.drafter.parity import assert_parity
from tests.drafter.published import DFLASH, DFLASH2, HIDDEN, VOCAB, changed, dflash2, random_weights, save_random

pytestmark = pytest.mark.usefixtures("needs_reference")


@pytest.mark.parametrize("variant", DFLASH)
def test_dflash_drafts_equal_the_reference_over_steps_with_cropping(variant, target, tmp_path):
    assert_parity(save_random(tmp_path, DFLASH[variant]), target)


@pytest.mark.parametrize("draw", [Draw(), Draw(0.7, 11), Draw(1.6, 2**63 + 5)], ids=["greedy", "T=0.7", "T=1.6"])
@pytest.mark.parametrize("variant", DFLASH2)
def test_dflash2_choices_equal_the_reference_over_steps_with_cropping(variant, draw, target, tmp_path):
    assert_parity(save_random(tmp_path, DFLASH2[variant]), target, draw)


@pytest.mark.parametrize("values", [*DFLASH.values(), *DFLASH2.values()], ids=[*DFLASH, *DFLASH2])
def test_layers_as_other_devices_run_them_draft_the_same(values, target, tmp_path, monkeypatch):
    monkeypatch.setattr(block_drafter, "draft_layers", DeviceLayers)
    assert_parity(save_random(tmp_path, values), target)


@pytest.mark.parametrize("values", [changed(), dflash2()], ids=["dflash", "dflash2"])
@pytest.mark.parametrize("own", ["embed_tokens", "lm_head", "both"])
def test_a_drafters_own_embedding_and_head_take_the_place_of_the_targets(values, own, target, tmp_path):
    extra = {
        f"{name}__weight": torch.randn(VOCAB, HIDDEN) for name in ("embed_tokens", "lm_head") if own in (name, "both")
    }
    assert_parity(save_random(tmp_path, values, **extra), target)


def test_a_tied_drafter_uses_its_own_embedding_as_head(target, tmp_path):
    embedding = torch.randn(VOCAB, HIDDEN)
    save_random(tmp_path / "tied", changed(tie_word_embeddings=True), embed_tokens__weight=embedding)
    save_random(tmp_path / "both", changed(), embed_tokens__weight=embedding, lm_head__weight=embedding.clone())
    tied, both = (load_drafter(tmp_path / name, target) for name in ("tied", "both"))
    assert torch.equal(tied.head, both.head)
    assert_parity(tmp_path / "tied", target)


def test_dflash2_as_it_is_initialised_is_dflash(target, tmp_path):
    plain = random_weights(changed())
    values = dflash2(kernel=3, top_k=4)
    fresh = DflashNetwork(parse_dflash_config(values, "test")).state_dict()
    save_drafter(tmp_path / "dflash", changed(), plain)
    save_drafter(tmp_path / "dflash2", values, fresh | plain)
    proposals = []
    for name in ("dflash", "dflash2"):
        drafter = BlockDrafter(load_drafter(tmp_path / name, target), target)
        drafter.open(1)
        drafter.extend_one(1, 0, torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1)))
        proposals.append(drafter.propose([1], [7], [5], num_candidates=4)[0])
    assert torch.equal(proposals[0].candidate_ids, proposals[1].candidate_ids)
    ours, theirs = proposals[1].logprobs, proposals[0].logprobs
    assert torch.allclose(ours, theirs - theirs.logsumexp(-1, keepdim=True), atol=1e-5)


def test_dflash2_sequences_drafted_together_get_the_drafts_they_get_alone(target, tmp_path):
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, dflash2()), target), target)
    draws = [Draw(0.0, 1), Draw(1.0, 2), Draw(1.0, 3)]
    for session, rows in ((1, 5), (2, 19), (3, 300)):
        drafter.open(session)
        drafter.extend_one(session, 0, torch.randn(rows, HIDDEN))
    together = drafter.propose([1, 2, 3], [4, 5, 6], [5, 2, 3], 3, draws)
    for i, (count, proposal) in enumerate(zip((5, 2, 3), together, strict=True)):
        alone = drafter.propose([i + 1], [4 + i], [count], 3, [draws[i]])[0]
        assert torch.equal(alone.candidate_ids, proposal.candidate_ids)
        assert proposal.candidate_ids.shape == (count, 3)
