"""Weights of draft slots follow their formulas."""

import math

import torch

from dflash_ray.training.losses import IGNORE, cross_entropies, decay_weights, divergences, dpace_weights

ALL = torch.ones(1, 5, dtype=torch.bool)


def test_slots_that_surely_pass_weigh_the_number_of_slots_from_them_on():
    weights = dpace_weights(torch.zeros(1, 5), ALL)
    assert weights.tolist() == [[5.0, 4.0, 3.0, 2.0, 1.0]]


def test_dpace_weights_are_the_sums_of_reaches_from_a_slot_on():
    losses = torch.tensor([[0.3, 1.2, 0.1, 2.0, 0.7]])
    chances = [0.5 * math.exp(-loss) + 0.5 for loss in losses[0].tolist()]
    reaches = [math.prod(chances[: m + 1]) for m in range(5)]
    expected = [sum(reaches[j:]) for j in range(5)]
    torch.testing.assert_close(dpace_weights(losses, ALL)[0], torch.tensor(expected))


def test_a_slot_without_a_label_weighs_nothing_and_halves_the_reach_behind_it():
    valid = torch.tensor([[True, False, True]])
    assert dpace_weights(torch.zeros(1, 3), valid).tolist() == [[1.5, 0.0, 0.5]]


def test_no_gradient_flows_through_dpace_weights():
    losses = torch.ones(1, 5, requires_grad=True)
    assert not dpace_weights(losses, ALL).requires_grad


def test_decay_weights_fall_to_a_share_of_one_over_e():
    weights = decay_weights(torch.ones(1, 5, dtype=torch.bool), 4.0)
    torch.testing.assert_close(weights[0, 4] / weights[0, 0], torch.tensor(1 / math.e))


def test_slots_without_labels_have_no_cross_entropy():
    losses = cross_entropies(torch.randn(2, 3, 7), torch.full((2, 3), IGNORE))
    assert losses.eq(0).all()


def test_the_divergence_is_zero_only_from_the_same_distribution():
    logits = torch.randn(2, 3, 7)
    torch.testing.assert_close(divergences(logits + 3.0, logits), torch.zeros(2, 3), rtol=0, atol=1e-6)
    assert divergences(logits.flip(-1), logits).gt(0).all()
