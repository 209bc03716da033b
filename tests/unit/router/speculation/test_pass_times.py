"""Times of passes are learnt from passes, noisy ones too, and still compare when the machine has got slower."""

import numpy as np
import pytest

from dflash_ray.router.speculation.cost_model import Batch, CostModel
from dflash_ray.router.speculation.pass_times import bucket

PLAIN = [Batch(count, count, 100 * count) for count in (1, 2, 4, 8)]


def true_seconds(batch: Batch, rows: int) -> float:
    return 0.030 + 0.002 * (batch.num_rows + rows) + 1e-6 * batch.context_tokens


def learn(costs: CostModel, num_passes: int, noise: float = 0.0, slower: float = 1.0, rows=(0, 2, 6), seed=0) -> None:
    random = np.random.default_rng(seed)
    for _ in range(num_passes):
        batch = PLAIN[random.integers(len(PLAIN))]
        count = rows[random.integers(len(rows))] * batch.num_sequences
        costs.saw_pass(batch, count, slower * true_seconds(batch, count) * float(np.exp(random.normal(0, noise))))


def expected(costs: CostModel, batch: Batch, rows: int) -> float:
    return float(costs.pass_seconds(batch, np.array([rows]))[0])


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.01), (0.15, 0.15)])
def test_what_was_seen_is_expected_again(noise, tolerance):
    costs = CostModel()
    learn(costs, 600, noise)
    for batch in PLAIN:
        for rows in (0, 2 * batch.num_sequences, 6 * batch.num_sequences):
            assert expected(costs, batch, rows) == pytest.approx(true_seconds(batch, rows), rel=tolerance)


def test_batches_that_were_never_seen_follow_the_law():
    costs = CostModel()
    learn(costs, 300)
    unseen = Batch(3, 3, 300)
    assert expected(costs, unseen, 9) == pytest.approx(true_seconds(unseen, 9), rel=0.03)


def test_one_pass_is_enough_for_a_first_idea():
    costs = CostModel()
    assert not costs.is_known
    costs.saw_pass(PLAIN[0], 0, 0.05)
    assert costs.is_known
    assert expected(costs, PLAIN[0], 0) == pytest.approx(0.05, rel=0.2)
    assert 0.05 < expected(costs, PLAIN[0], 7) < 0.1


def test_more_rows_are_never_expected_to_take_less_time():
    costs = CostModel()
    for _ in range(10):  # four rows cost more than five, as some products do
        for rows, seconds in ((0, 0.03), (3, 0.041), (4, 0.037), (7, 0.045)):
            costs.saw_pass(PLAIN[0], rows, seconds)
    times = costs.pass_seconds(PLAIN[0], np.arange(16))
    assert (np.diff(times) >= 0).all() and times[0] == pytest.approx(0.03, rel=0.05)


def test_a_spike_changes_nothing():
    costs = CostModel()
    learn(costs, 300)
    costs.saw_pass(PLAIN[0], 0, 3.0)
    assert expected(costs, PLAIN[0], 0) < 1.1 * true_seconds(PLAIN[0], 0)


def test_a_slower_machine_is_slower_for_passes_too_that_were_not_seen_since():
    costs = CostModel()
    learn(costs, 400)
    learn(costs, 60, slower=1.5, rows=(6,))
    assert expected(costs, PLAIN[2], 0) == pytest.approx(1.5 * true_seconds(PLAIN[2], 0), rel=0.05)


def test_the_error_of_a_plain_time_shrinks_with_its_measurements():
    costs = CostModel()
    learn(costs, 200, noise=0.15)
    few, many = Batch(16, 16, 1600), PLAIN[0]
    costs.saw_pass(few, 0, true_seconds(few, 0))
    assert costs.num_plain(few) == 1 < costs.num_plain(many)
    assert costs.plain_error(few) > 2 * costs.plain_error(many) > 0.02


def test_prompts_do_not_spoil_the_times_of_steps_without():
    costs = CostModel()
    learn(costs, 200)
    for _ in range(50):
        costs.saw_pass(Batch(1, 257, 400, prefill_rows=256), 0, 0.9)
    assert expected(costs, PLAIN[0], 0) == pytest.approx(true_seconds(PLAIN[0], 0), rel=0.02)
    assert costs.num_plain(PLAIN[0]) > 5


def waited(costs: CostModel, count: int, slots: int, usual: float = 0.03) -> float:
    return float(costs.wait_seconds(np.array([count]), np.array([slots]), False, usual)[0])


def test_the_wait_for_drafts_is_learnt_by_how_many_are_drafted_for():
    costs = CostModel()
    assert waited(costs, 1, 7) == pytest.approx(0.01)  # a third of a pass, before any was waited for
    for _ in range(20):
        for count in (1, 4, 8):
            costs.saw_wait(count, 7 * count, False, 0.005 + 0.001 * count)
        costs.saw_wait(0, 0, False, 0.0004)
    assert waited(costs, 4, 28) == pytest.approx(0.009, rel=0.05)
    assert waited(costs, 16, 112) == pytest.approx(0.021, rel=0.25)
    assert waited(costs, 0, 0) == pytest.approx(0.0004)


def test_a_drafter_that_is_late_is_expected_to_be_late_at_once_and_forgiven_in_time():
    costs = CostModel()
    for _ in range(20):
        costs.saw_wait(1, 7, False, 0.010)
    costs.saw_wait(1, 7, False, 0.100)
    assert waited(costs, 1, 7) > 0.03
    for _ in range(300):
        costs.saw_wait(0, 0, False, 0.0)
    assert waited(costs, 1, 7) < 0.015


def test_buckets_are_exact_for_few_and_a_sixth_of_an_octave_wide_for_many():
    assert [bucket(count) for count in range(17)] == list(range(17))
    counts = range(17, 3000)
    assert all(bucket(count) <= bucket(count + 1) for count in counts)
    assert all(bucket(int(1.2 * count)) > bucket(count) for count in counts)
