"""The verification operators reach the reference's verdict to the bit, whatever the step, the device or the shards."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dflash_ray.kernels import reference_floats
from dflash_ray.kernels.columns import FloatColumn, IntColumn, Mode, PlanTensors, Purpose
from dflash_ray.kernels.reference_verify import philox, uniforms
from dflash_ray.sampling.noise import MAX_GUMBEL
from tests.unit.kernels.plans import (
    DTYPES,
    assert_same,
    logits_for,
    plan_of,
    plans,
    reference_operator,
    run_step,
    torch_operator,
)

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@given(data=st.data(), vocab=st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 257, 1021])))
@settings(deadline=None, max_examples=60)
def test_a_step_gets_the_references_verdict(implementation, data, vocab):
    plan = data.draw(plans(vocab))
    logits = data.draw(logits_for(plan, vocab))
    got = run_step(implementation.operator, logits, plan, device=implementation.device)
    assert_same(got, run_step(reference_operator, logits, plan))


@given(data=st.data(), vocab=st.integers(1, 300), num_shards=st.integers(2, 8))
@settings(deadline=None, max_examples=30)
def test_the_number_of_shards_changes_nothing(implementation, data, vocab, num_shards):
    plan = data.draw(plans(vocab))
    logits = data.draw(logits_for(plan, vocab))
    alone = run_step(implementation.operator, logits, plan, device=implementation.device)
    assert_same(run_step(implementation.operator, logits, plan, num_shards, implementation.device), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [49_152, 152_063])
def test_large_vocabularies_get_the_references_verdict(implementation, vocab, dtype):
    parameters = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"top_k": 40, "top_p": 0.95, "min_p": 0.01},
        {"mode": Mode.REJECTION, "top_p": 0.9},
    ]
    plan = [plan_of([1, 2], seed=i, num_logprobs=2, **values) for i, values in enumerate(parameters)]
    logits = (torch.randn(8, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(dtype)
    got = run_step(implementation.operator, logits, plan, device=implementation.device)
    assert_same(got, run_step(reference_operator, logits, plan))


@pytest.mark.parametrize("block", [1, 2, 31, 32])
def test_a_block_that_repeats_the_truth_is_accepted_whole(implementation, block):
    generator = torch.Generator().manual_seed(block)
    logits = torch.randn(block, 50, generator=generator) * 2
    plain = [
        run_step(
            implementation.operator, logits[i : i + 1], [plan_of([0], position=10 + i)], device=implementation.device
        )
        for i in range(block)
    ]
    truth = [outcomes[0].tokens[0] for outcomes, _ in plain]
    outcomes, _ = run_step(implementation.operator, logits, [plan_of([0, *truth[:-1]])], device=implementation.device)
    assert outcomes[0].tokens == truth


def test_a_step_without_rows_is_no_error(implementation):
    outcomes, _ = run_step(implementation.operator, torch.empty(0, 50), [], device=implementation.device)
    assert outcomes == []


def test_equal_logits_are_drawn_lowest_id_first_when_greedy(implementation):
    plan = [plan_of([0], temperature=0.0)]
    for num_shards in (1, 3):
        outcomes, _ = run_step(implementation.operator, torch.zeros(1, 700), plan, num_shards, implementation.device)
        assert outcomes[0].tokens == [0]


def test_the_features_of_an_accepted_path_are_moved_together(implementation):
    logits = torch.zeros(4, 10)
    logits[0, 5] = logits[2, 6] = logits[3, 7] = 9.0
    plan = [plan_of([1, 4, 5, 6], [-1, 0, 0, 2], temperature=0.0, feature_row=0)]
    outcomes, features = run_step(implementation.operator, logits, plan, device=implementation.device)
    assert outcomes[0].accepted_rows == [2, 3] and outcomes[0].tokens == [5, 6, 7]
    assert features[:3, 0].tolist() == [0.0, 6.0, 9.0]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = philox(np.array(counter, dtype=np.uint64)[:, None], key)
    assert tuple(int(word) for word in words[:, 0]) == answer


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
    ids=st.lists(st.integers(0, 2**20), min_size=1, max_size=9),
    purpose=st.sampled_from(Purpose),
)
@settings(deadline=None)
def test_the_noise_is_that_of_the_published_generator(implementation, seed, position, ids, purpose):
    device = implementation.device
    seeds, positions, tokens = torch.tensor([seed]), torch.tensor([position]), torch.tensor([ids])
    noise = implementation.operator("gumbel_noise", tokens)(
        seeds.to(device), positions.to(device), tokens.to(device), int(purpose)
    )
    expected = reference_floats.gumbel(uniforms(seed, position, np.array(ids), purpose))
    assert np.array_equal(noise.cpu().numpy()[0], expected)


# The ends, both sides of the root of 1/2 with its halves, and words between.
WORDS = np.unique(
    np.concatenate(
        [at + np.arange(-300, 300) for at in (0, 2**24, 11_863_283, 5_931_641, 2**23, 6_172_000)]
        + [np.arange(0, 2**24, 4099)]
    ).clip(0, 2**24 - 1)
)


def test_the_noise_is_gumbels_to_a_millionth_and_rises_with_its_uniform():
    drawn = (WORDS + 0.5) * 2.0**-24
    noise = reference_floats.gumbel(drawn)
    exact = -np.log(-np.log(drawn))
    assert np.abs(noise - exact).max() < 1e-6
    assert np.diff(noise).min() > -1e-6
    assert noise.max() < MAX_GUMBEL


@given(
    a=st.floats(-1e4, 1e4, width=32), b=st.floats(-1e4, 1e4, width=32), c=st.floats(-1e4, 1e4, width=32),
)  # fmt: skip
def test_a_fused_multiply_add_is_rounded_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = reference_floats.fma(np.array([a], np.float32), b, np.array([c], np.float32))[0]
    neighbours = (np.nextafter(got, np.float32(-np.inf)), np.nextafter(got, np.float32(np.inf)))
    assert all(abs(Fraction(float(got)) - exact) <= abs(Fraction(float(other)) - exact) for other in neighbours)


def test_seeds_positions_and_purposes_are_independent_streams():
    ids = np.arange(4096)
    base = uniforms(1, 2, ids, Purpose.TARGET)
    for other in (
        uniforms(2, 2, ids, Purpose.TARGET),
        uniforms(1 + 2**32, 2, ids, Purpose.TARGET),
        uniforms(1, 3, ids, Purpose.TARGET),
        uniforms(1, 2 + 2**32, ids, Purpose.TARGET),
        uniforms(1, 2, ids, Purpose.RESIDUAL),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.1


NUM_DRAWS = 1_000_000
LAW = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -0.5, 0.2])


def draws(mode: Mode, draft_ids: torch.Tensor, draft_probs: torch.Tensor, num_rows: int) -> np.ndarray:
    """First tokens of a million sequences with seeds of their own; each drafts one token by `draft_probs`."""
    operator = torch_operator("dflash_ray")
    generator = torch.Generator().manual_seed(5)
    picks = draft_ids[torch.multinomial(draft_probs, NUM_DRAWS, replacement=True, generator=generator)]
    sequences, roots = torch.arange(NUM_DRAWS), torch.arange(NUM_DRAWS) * num_rows
    rows = torch.zeros(NUM_DRAWS, num_rows, 4, dtype=torch.int64)
    rows[:, :, 0], rows[:, :, 1] = sequences[:, None], torch.arange(11, 11 + num_rows)
    rows[:, 0, 3] = -1
    if num_rows > 1:
        rows[:, 1, 2], rows[:, 1, 3] = picks, roots
    ints = torch.zeros(NUM_DRAWS, len(IntColumn), dtype=torch.int64)
    ints[:, IntColumn.SEED], ints[:, IntColumn.MODE] = sequences * 2654435761, mode
    ints[:, IntColumn.FIRST_ROW], ints[:, IntColumn.NUM_ROWS] = roots, num_rows
    floats = torch.ones(NUM_DRAWS, len(FloatColumn))
    floats[:, FloatColumn.LOG_MIN_P] = -torch.inf
    floats[:, FloatColumn.PRESENCE] = floats[:, FloatColumn.FREQUENCY] = 0
    plan = PlanTensors(rows.view(-1, 4), ints, floats, torch.empty(0).long(), torch.empty(0))
    logits = LAW.expand(len(plan.rows), -1)
    if mode == Mode.COUPLED:
        partials = operator("verify_coupled", logits)(logits, 0, plan, None, False)
        nothing = torch.empty(0, 0)
        outcome = operator("verify_combine", logits)(partials[None], plan, nothing.long(), nothing, num_rows)
    else:
        ids = torch.full((NUM_DRAWS, num_rows, len(draft_ids)), -1)
        ids[:, 0] = draft_ids
        probs = draft_probs.expand(NUM_DRAWS * num_rows, -1).contiguous()
        maxima = torch.full((len(plan.rows),), float(LAW.max()), dtype=torch.float64)
        drafts = (ids.view(-1, len(draft_ids)), probs)
        partials = operator("verify_rejection", logits)(logits, 0, plan, maxima, None, *drafts)
        outcome = operator("verify_combine", logits)(partials[None], plan, *drafts, num_rows)
    return np.bincount(outcome[:, 2].numpy(), minlength=len(LAW))


def p_value(counts: np.ndarray) -> float:
    return chisquare(counts, LAW.double().softmax(-1).numpy() * counts.sum()).pvalue


ONE_HOT = (torch.tensor([4]), torch.tensor([1.0]))
SELECTOR = (torch.tensor([4, 0, 6]), torch.tensor([0.6, 0.1, 0.3]))


@pytest.mark.slow
def test_a_million_coupled_draws_follow_the_target():
    assert p_value(draws(Mode.COUPLED, *ONE_HOT, num_rows=1)) > 1e-4
    assert p_value(draws(Mode.COUPLED, *ONE_HOT, num_rows=2)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [ONE_HOT, SELECTOR], ids=["one-hot", "selector"])
def test_a_million_draws_by_rejection_follow_the_target(drafts):
    assert p_value(draws(Mode.REJECTION, *drafts, num_rows=2)) > 1e-4


@pytest.mark.slow
def test_the_distribution_test_fails_when_draft_probabilities_are_wrong(monkeypatch):
    real = torch.multinomial
    wrong = torch.tensor([0.1, 0.6, 0.3])
    monkeypatch.setattr(torch, "multinomial", lambda probs, *args, **kwargs: real(wrong, *args, **kwargs))
    assert p_value(draws(Mode.REJECTION, *SELECTOR, num_rows=2)) < 1e-6
