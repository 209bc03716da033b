"""Chances of drafts: by slot, by sequence, by what the drafter says, and of n-grams."""

import numpy as np
import pytest

from dflash_ray.router.speculation.acceptance import Acceptance

UNKNOWN = np.full((1, 4), np.nan)


def verify(model: Acceptance, slot: int, accepted: int, count: int = 4, log_probs=None) -> None:
    given = np.full((1, count), np.nan) if log_probs is None else np.array([log_probs])
    model.saw_drafts(np.array([slot]), np.array([count]), np.array([accepted]), given)


def test_chances_follow_what_passes_said_of_each_slot():
    model = Acceptance(2, 8)
    random = np.random.default_rng(0)
    for _ in range(400):
        right = random.random(4) < [0.9, 0.7, 0.5, 0.3]
        verify(model, 0, int(np.cumprod(right).sum()))
    survival = model.survival(np.array([0]))[0]
    assert survival[:3] == pytest.approx([0.9, 0.63, 0.315], abs=0.17)
    assert (np.diff(survival) <= 0).all()


def test_a_new_sequence_starts_with_what_is_known_of_the_others():
    model = Acceptance(3, 4)
    for _ in range(300):
        verify(model, 0, 0)
    assert model.survival(np.array([2]))[0, 0] < 0.15
    verify(model, 1, 4)
    verify(model, 1, 4)
    one, other = model.survival(np.array([1, 2]))[:, 0]
    assert one > 3 * other
    model.open(1)
    assert model.survival(np.array([1]))[0, 0] == pytest.approx(model.survival(np.array([2]))[0, 0])


def test_a_sequence_that_fails_at_length_is_not_taken_for_what_the_others_are():
    model = Acceptance(3, 4)
    for _ in range(200):
        verify(model, 0, 4)
    unknown = model.survival(np.array([1]))[0, 0]
    for _ in range(16):
        verify(model, 1, 0)
        verify(model, 0, 4)
    assert unknown > 0.9 and model.survival(np.array([1]))[0, 0] < 0.18
    for _ in range(200):
        model.rested(np.array([1]))
    assert model.survival(np.array([1]))[0, 0] == pytest.approx(model.survival(np.array([2]))[0, 0], abs=0.03)


def test_drafts_behind_the_first_wrong_one_say_nothing():
    model = Acceptance(1, 4)
    before = model.survival(np.array([0]))[0]
    for _ in range(50):
        verify(model, 0, 0)
    after = model.survival(np.array([0]))[0]
    assert after[1] / after[0] == pytest.approx(before[1] / before[0])


def test_a_slot_is_not_known_by_its_best_drafts_alone():
    model, random = Acceptance(1, 4), np.random.default_rng(0)
    for _ in range(600):  # half of the drafts are poor, and are left out
        sure = random.random(2) < 0.5
        count = int(np.cumprod(sure).sum())
        accepted = int(np.cumprod(random.random(count) < 0.9).sum())
        said = np.log(np.where(sure, 0.9, 0.12))
        model.saw_drafts(np.array([0]), np.array([count]), np.array([accepted]), said[None])
    assert model.survival(np.array([0]))[0, 0] == pytest.approx(0.5, abs=0.2)
    assert model.survival_of(np.array([0]), np.log([[0.9]]))[0, 0] == pytest.approx(0.9, abs=0.05)


def test_what_is_known_of_a_sequence_fades_while_nothing_is_drafted_for_it():
    model = Acceptance(2, 4)
    for _ in range(30):
        verify(model, 1, 4)
    for _ in range(8):
        verify(model, 0, 0)
    low = model.survival(np.array([0]))[0, 0]
    for _ in range(100):
        model.rested(np.array([0]))
    assert low < 0.35 and model.survival(np.array([0]))[0, 0] > 2 * low


def test_the_drafters_word_is_calibrated():
    """A drafter that says 0.9 and is right half the time is believed half the time."""
    model = Acceptance(8, 4)
    random = np.random.default_rng(1)
    sure, unsure = float(np.log(0.93)), float(np.log(0.15))
    for _ in range(600):
        slots = np.arange(8)
        says = np.where(random.random((8, 4)) < 0.5, sure, unsure)
        right = random.random((8, 4)) < np.where(says == sure, 0.5, 0.05)
        accepted = np.cumprod(right, axis=1).sum(axis=1)
        model.saw_drafts(slots, np.full(8, 4), accepted, says)
    chances = model.survival_of(np.array([0, 1]), np.array([[sure] * 4, [unsure] * 4]))[:, 0]
    assert chances == pytest.approx([0.5, 0.05], abs=0.12)
    assert model.calibration_error < 0.05


def test_a_drafter_that_is_worse_than_it_says_shows_in_the_calibration():
    model = Acceptance(1, 4)
    for _ in range(10):
        verify(model, 0, 0, log_probs=[np.log(0.95)] * 4)
    assert model.calibration_error > 0.3


def test_a_sequence_whose_drafts_are_better_than_their_probability_says_is_believed_more():
    model = Acceptance(3, 4)
    says = np.log([0.55] * 4)
    for step in range(200):
        verify(model, 0, 4, log_probs=says)
        verify(model, 1, 0 if step % 4 else 4, log_probs=says)
    good, bad = model.survival_of(np.array([0, 1]), np.array([says, says]))[:, 0]
    assert good > bad + 0.3


def test_drafts_without_probabilities_go_by_what_is_known_of_their_slots():
    model = Acceptance(1, 4)
    for _ in range(20):
        verify(model, 0, 2)
    assert model.survival_of(np.array([0]), UNKNOWN)[0] == pytest.approx(model.survival(np.array([0]))[0])


def test_certain_and_impossible_drafts_have_finite_chances():
    model = Acceptance(1, 4)
    says = np.array([0.0, -np.inf, -50.0, 0.0])
    for _ in range(300):
        verify(model, 0, 1, log_probs=says)
    chances = model.survival_of(np.array([0]), says[None])
    assert np.isfinite(chances).all() and chances[0, 0] > 0.9 and chances[0, 1] < 0.1


def test_ngrams_are_worth_more_the_longer_their_match():
    model = Acceptance(1, 8)
    survival = model.ngram_survival(np.array([0, 2, 3, 4, 5]), np.full(5, 8))
    assert (np.diff(survival[:, 0]) > 0).all() and survival[0].max() == 0.0
    assert survival[4, 7] > 0.3
    assert model.ngram_survival(np.array([5]), np.array([3]))[0, 3:].max() == 0.0


def test_ngrams_are_judged_by_the_length_of_their_match():
    model = Acceptance(1, 8)
    for _ in range(200):
        model.saw_ngrams(np.array([5, 2]), np.array([8, 8]), np.array([0, 8]))
    long, short = model.ngram_survival(np.array([5, 2]), np.array([8, 8]))[:, 0]
    assert long < 0.15 and short > 0.85
