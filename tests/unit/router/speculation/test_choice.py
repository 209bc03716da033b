"""Rows go to the slots that are worth most, and for whom it is drafted is decided by what it promises."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dflash_ray.router.speculation.choice import LEAST_WORTH, best_rows, is_drafted, row_grid, share, worths

CHANCES = st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.8, 0.99, 1.0]) | st.floats(0, 1)
SURVIVALS = arrays(float, st.tuples(st.integers(1, 12), st.integers(1, 8)), elements=CHANCES).map(
    lambda chances: np.cumprod(chances, axis=1)
)


@given(survival=SURVIVALS, num_rows=st.integers(0, 60))
def test_the_best_slots_are_shared_out(survival, num_rows):
    counts = share(survival, num_rows)
    worth = np.sort(survival[survival >= LEAST_WORTH], axis=None)[::-1]
    assert counts.sum() == min(num_rows, len(worth))
    got = sum(survival[i, :count].sum() for i, count in enumerate(counts))
    assert np.isclose(got, worth[:num_rows].sum())


@given(survival=SURVIVALS, most=st.integers(0, 80))
def test_gains_are_those_of_the_best_slots(survival, most):
    rows, gains = best_rows(survival, most)
    for count, gain in zip(rows, gains, strict=True):
        assert np.isclose(gain, sum(np.sort(survival, axis=None)[::-1][: min(count, most)]), atol=0.002 * survival.size)
    assert rows[0] == gains[0] == 0


@given(drafted=SURVIVALS, seed=st.integers(0, 100))
def test_what_drafts_promise_is_known_closely_enough(drafted, seed):
    random = np.random.default_rng(seed)
    others = np.cumprod(random.random(drafted.shape), axis=1) * (random.random((len(drafted), 1)) < 0.5)
    options = worths(drafted, others, 1000)
    assert options.num_drafted[-1] == 0 and options.rows[0] == 0
    for level in range(len(options.num_drafted)):
        asked = is_drafted(options, level)
        assert asked.sum() == options.num_drafted[level]
        survival = np.where(asked[:, None], drafted, others)
        exact = np.concatenate([[0.0], np.cumsum(np.sort(survival, axis=None)[::-1])])
        wanted = exact[np.minimum(options.rows, survival.size)]
        assert np.abs(options.gains[level] - wanted).max() <= 0.06 * wanted.max() + 0.01


def test_those_whom_a_drafter_helps_most_are_drafted_for_first():
    drafted = np.cumprod(np.array([[0.9] * 4, [0.1] * 4, [0.8] * 4, [0.7] * 4]), axis=1)
    options = worths(drafted, np.zeros_like(drafted), 100)
    assert options.num_drafted.tolist() == [4, 2, 1, 0]
    assert is_drafted(options, 1).tolist() == [True, False, True, False]


def test_nobody_is_drafted_for_whose_ngram_promises_more():
    drafted = np.cumprod(np.full((2, 4), 0.5), axis=1)
    others = np.cumprod(np.array([[0.9] * 4, [0.2] * 4]), axis=1)
    options = worths(drafted, others, 100)
    assert options.num_drafted.tolist() == [1, 0] and is_drafted(options, 0).tolist() == [False, True]


def test_numbers_of_rows_worth_a_look_get_sparser():
    grid = row_grid(5000)
    assert grid[:33].tolist() == list(range(33)) and grid[-1] == 5000 and len(grid) < 110
    assert (np.diff(grid)[40:-1] / grid[40:-2] <= 0.125).all()
