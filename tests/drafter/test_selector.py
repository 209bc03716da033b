"""The selector's walk: ties, the noise it shares with the target, the probabilities it reports."""

import numpy as np
import pytest
import torch

from dflash_ray.kernels.draft_ops import walk_candidates
from dflash_ray.models.dflash2 import (
    CodebookSelector,
    Dflash2Config,
    Draw,
    FactorisedSelector,
    build_selector,
    top_candidates,
)
from dflash_ray.models.draft_choice import draw_values
from dflash_ray.sampling.noise import gumbel


def noise_of(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    return gumbel([seed], [position], torch.from_numpy(ids)[None])[0].numpy()


def walk(scores: np.ndarray, ids: np.ndarray, draws: list[Draw], firsts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the candidates of each slot were, in the order in which they are proposed, and their log-probabilities."""
    columns = (torch.from_numpy(np.ascontiguousarray(one)) for one in (scores, ids, *draw_values(draws)))
    ordered, logprobs = walk_candidates(*columns, torch.tensor(firsts))
    order = (ordered.numpy()[..., None] == ids[..., None, :]).argmax(axis=-1)
    return order, logprobs.numpy()


def walk_one(scores: np.ndarray, ids: np.ndarray, draw: Draw, position: int) -> tuple[np.ndarray, np.ndarray]:
    order, logprobs = walk(scores[None], ids[None], [draw], [position])
    return order[0], logprobs[0]


def test_equal_logits_leave_the_lower_ids_as_candidates():
    logits = torch.tensor([[0.0, 3.0, 1.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert top_candidates(logits, 3).tolist() == [[1, 2, 4], [0, 1, 2]]
    assert top_candidates(logits, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_candidates_are_the_largest_logits_in_the_order_of_their_ids():
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_candidates(logits, 7), logits.topk(7).indices.sort().values)


def test_the_greedy_walk_follows_the_choice_before_and_breaks_ties_by_id():
    ids = np.array([[3, 5], [2, 9], [4, 6]])
    scores = np.zeros((3, 2, 2), dtype=np.float32)
    scores[0] = [[1.0, 2.0]] * 2  # 5
    scores[1] = [[9.0, 0.0], [1.0, 1.0]]  # after 5 a tie: 2
    scores[2] = [[0.0, 4.0], [7.0, 0.0]]  # after 2: 6
    order, logprobs = walk_one(scores, ids, Draw(), 0)
    assert ids[np.arange(3), order[:, 0]].tolist() == [5, 2, 6]
    assert np.allclose(np.exp(logprobs).sum(axis=-1), 1.0)


def test_blocks_that_are_walked_together_choose_what_they_choose_alone():
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(3, 4, 5, 5)).astype(np.float32)
    ids = np.sort(generator.permuted(np.tile(np.arange(50), (3, 4, 1)), axis=-1)[..., :5], axis=-1)
    draws, firsts = [Draw(), Draw(0.7, 2**63 + 5), Draw(1.3, 4, True)], [3, 9, 200]
    order, logprobs = walk(scores, ids, draws, firsts)
    for block in range(3):
        alone = walk_one(scores[block], ids[block], draws[block], firsts[block])
        assert np.array_equal(order[block], alone[0]) and np.array_equal(logprobs[block], alone[1])


def test_a_draft_is_the_targets_own_draw_when_the_scores_are_its_logits():
    """Same seed, same position, same noise: whatever the temperature, and far above what chance would give."""
    generator = np.random.default_rng(0)
    ids = np.arange(40)[None]
    for seed in range(50):
        logits = generator.normal(size=40).astype(np.float32)
        draw = Draw(temperature=float(generator.uniform(0.2, 2.0)), seed=seed)
        order, _ = walk_one(np.broadcast_to(logits, (1, 40, 40)), ids, draw, 17)
        assert order[0, 0] == np.argmax(logits.astype(np.float64) / draw.temperature + noise_of(seed, 17, ids[0]))


def test_shared_noise_agrees_with_the_target_far_more_often_than_noise_of_its_own():
    """At least (1 - TV) / (1 + TV) of the draws agree (Daliri, Musco and Suresh 2024); without sharing sum of p * q."""
    generator = np.random.default_rng(1)
    ids, num_draws = np.arange(12)[None], 2000
    logits = generator.normal(size=12)
    scores = (logits + generator.normal(scale=0.4, size=12)).astype(np.float32)
    target_probs, draft_probs = (np.exp(x) / np.exp(x).sum() for x in (logits, scores.astype(np.float64)))
    distance = np.abs(target_probs - draft_probs).sum() / 2
    agreed = {"shared": 0, "own": 0}
    for position in range(num_draws):
        wanted = np.argmax(logits + noise_of(5, position, ids[0]))
        for noise, seed in (("shared", 5), ("own", 6)):
            order, _ = walk_one(np.broadcast_to(scores, (1, 12, 12)), ids, Draw(1.0, seed), position)
            agreed[noise] += order[0, 0] == wanted
    assert agreed["shared"] / num_draws > (1 - distance) / (1 + distance) - 0.03
    assert agreed["own"] / num_draws < (target_probs * draft_probs).sum() + 0.03 < agreed["shared"] / num_draws - 0.3


def test_drafts_follow_the_tempered_scores():
    scores = np.broadcast_to(np.array([0.0, 1.0, 2.0], dtype=np.float32), (1, 3, 3))
    ids = np.array([[4, 8, 15]])
    counts = np.zeros(3)
    for seed in range(4000):
        order, logprobs = walk_one(scores, ids, Draw(1.5, seed), 9)
        counts[order[0, 0]] += 1
    expected = np.exp(scores[0, 0] / 1.5) / np.exp(scores[0, 0] / 1.5).sum()
    assert np.abs(counts / 4000 - expected).max() < 0.03
    assert np.exp(logprobs[0]) == pytest.approx(expected[order[0]], abs=1e-6)


def test_behind_the_drawn_candidate_the_others_follow_by_score():
    scores = np.broadcast_to(np.array([2.0, 0.5, 2.0, 1.0], dtype=np.float32), (1, 4, 4))
    for seed in range(30):
        order, _ = walk_one(scores, np.array([[1, 2, 3, 4]]), Draw(3.0, seed), 0)
        rest = [index for index in (0, 2, 3, 1) if index != order[0, 0]]
        assert order[0, 1:].tolist() == rest


def test_factorised_codebooks_score_as_their_expansion_does():
    config = Dflash2Config(conv_kernel_size=2, conv_group_size=4, selector_rank=3, selector_top_k=4, is_factorised=True)
    torch.manual_seed(0)
    selector = build_selector(20, 8, config)
    assert isinstance(selector, FactorisedSelector)
    torch.nn.init.normal_(selector.successor_projection.weight)
    selector.bind(torch.randn(20, 8), torch.randn(20, 8))
    hidden, logits, anchors = torch.randn(2, 3, 8), torch.randn(2, 3, 20), torch.tensor([1, 19])
    expanded = selector.expanded(config)
    assert type(expanded) is CodebookSelector
    for mine, other in zip(selector(hidden, logits, anchors), expanded(hidden, logits, anchors), strict=True):
        torch.testing.assert_close(mine, other)
    assert not torch.equal(
        selector(hidden, logits, anchors)[1][:, :, 0], logits.gather(-1, selector(hidden, logits, anchors)[0])
    )
