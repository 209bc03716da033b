"""Many blocks under one mask give what each block gives by itself when serving."""

import pytest
import torch
from torch.nn import functional as F

from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.dflash import rope_tables
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.drafter_config import parse_dflash_config
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.batches import BlockBatch
from dflash_ray.training.config import FitSection
from dflash_ray.training.objective import DrafterObjective
from dflash_ray.training.parallel import forward_blocks
from tests.drafter.published import DFLASH, DFLASH2, random_weights

LENGTH = 30
ANCHORS = torch.tensor([[1, 7, 8, 29], [25, 3, 12, 12]])
KINDS = ("full attention", "sliding causal and full", "sliding bidirectional", "causal everywhere")


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_in_one_pass_are_the_blocks_one_by_one(kind, target_dir):
    values = DFLASH[kind]
    config, target = parse_dflash_config(values, kind), resolve_target(str(target_dir))
    checkpoint = DrafterCheckpoint(config, random_weights(values), "test")
    drafter, network = BlockDrafter(checkpoint, target), checkpoint.build_network()
    embedding, head = target.load_embedding(), target.load_head()
    features = torch.randn(2, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(0))
    block_ids = torch.full((*ANCHORS.shape, config.block_size), config.mask_token_id)
    block_ids[..., 0] = ANCHORS % 50
    rope = rope_tables(config, LENGTH + config.block_size)
    with torch.no_grad():
        hidden = forward_blocks(network, features, ANCHORS, F.embedding(block_ids, embedding), rope)
    probabilities = F.softmax(F.linear(hidden[:, :, 1:], head), dim=-1)
    for row, anchors in enumerate(ANCHORS.tolist()):
        for at, anchor in enumerate(anchors):
            drafter.open(1)
            drafter.extend_one(1, 0, features[row, :anchor])
            (alone,) = drafter.propose([1], [anchor % 50], [config.block_size - 1], config.vocab_size)
            expected = torch.zeros_like(probabilities[row, at])
            expected.scatter_(1, alone.candidate_ids, alone.logprobs.exp())
            torch.testing.assert_close(probabilities[row, at], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", DFLASH2)
def test_a_selector_that_is_trained_chooses_what_it_chooses_when_serving(kind, target_dir):
    """With the serving drafter's own choices as labels, every choice after the true token must be right."""
    values = DFLASH2[kind]
    config, target = parse_dflash_config(values, kind), resolve_target(str(target_dir))
    checkpoint = DrafterCheckpoint(config, random_weights(values), "test")
    drafter = BlockDrafter(checkpoint, target)
    objective = DrafterObjective(config, FitSection(bf16=False), target, torch.arange(config.vocab_size), LENGTH)
    with torch.no_grad():
        for name, parameter in objective.trainable().items():
            parameter.copy_(checkpoint.weights[name])
        taps = torch.randn(2, LENGTH, 2 * config.hidden_size, generator=torch.Generator().manual_seed(0))
        features = objective.projector(taps)
    labels = torch.zeros(*ANCHORS.shape, config.block_size - 1, dtype=torch.int64)
    for row, anchors in enumerate(ANCHORS.tolist()):
        for at, anchor in enumerate(anchors):
            drafter.open(1)
            drafter.extend_one(1, 0, features[row, :anchor])
            (alone,) = drafter.propose([1], [anchor % 50], [config.block_size - 1], 1)
            labels[row, at] = alone.candidate_ids[:, 0]
    result = objective(BlockBatch(taps, ANCHORS, ANCHORS % 50, labels))
    assert result.is_right.all()
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in objective.trainable().values())
