"""Verification keeps the target's law: by enumeration of draws, over any number of shards, and row by row."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from dflash_ray.kernels import draft_ops
from dflash_ray.sampling import verify as verify_module
from dflash_ray.sampling.parameters import COUPLED, REJECTION
from dflash_ray.sampling.ranks import SingleRank
from tests.plans import SequencePlan, verify
from tests.ranks import run_sharded
from tests.unit.kernels.plans import plan_of


def verify_alone(logits: torch.Tensor, plan: list[SequencePlan]):
    return verify(logits.clone(), 0, plan, SingleRank())


def verify_sharded(logits: torch.Tensor, plan: list[SequencePlan], size: int):
    per_rank = -(-logits.shape[1] // size)

    def run(rank: int, group):
        start = rank * per_rank
        return verify(logits[:, start : start + per_rank].clone(), start, plan, group)

    outcomes = run_sharded(size, run)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return outcomes[0]


PARAMETERS = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.2, "top_p": 0.7},
    {"temperature": 0.9, "min_p": 0.05, "top_p": 0.95, "top_k": 40},
    {"temperature": 1.0, "mode": REJECTION, "top_p": 0.9},
    {"temperature": 1.0, "frequency_penalty": 0.7, "history_ids": [3, 9], "history_counts": [2, 1]},
]


@pytest.mark.parametrize("values", PARAMETERS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_number_of_shards_changes_nothing(values, size):
    logits = torch.randn(20, 331, generator=torch.Generator().manual_seed(size)) * 3
    plan = [plan_of([1, 5, 9, 9, 2], seed=seed, **values) for seed in range(4)]
    alone = verify_alone(logits, plan)
    assert [o.tokens for o in verify_sharded(logits, plan, size)] == [o.tokens for o in alone]


def test_top_k_top_p_and_min_p_allow_the_tokens_that_sorting_allows():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2
    probs = logits[0].softmax(-1)
    order = probs.argsort(descending=True)
    nucleus = order[(probs[order].cumsum(0) - probs[order]) < 0.6]
    allowed = {
        "top_k": (order[:5], {"top_k": 5}),
        "top_p": (nucleus, {"top_p": 0.6}),
        "min_p": (torch.nonzero(probs >= 0.2 * probs.max()).flatten(), {"min_p": 0.2}),
    }
    for tokens, values in allowed.values():
        plans = [plan_of([0], seed=seed, **values) for seed in range(600)]
        drawn = {o.tokens[0] for o in verify_alone(logits.expand(600, -1), plans)}
        assert drawn <= set(tokens.tolist())
        assert len(drawn) >= min(len(tokens), 3)


def test_equal_logits_are_drawn_lowest_id_first_when_greedy():
    outcome = verify_alone(torch.zeros(1, 40), [plan_of([0], temperature=0.0)])
    assert outcome[0].tokens == [0]
    assert verify_sharded(torch.zeros(1, 40), [plan_of([0], temperature=0.0)], 3)[0].tokens == [0]


def test_a_row_that_is_not_finite_flags_its_sequence_only():
    logits = torch.randn(3, 40)
    logits[1, 7] = float("nan")
    plan = [plan_of([0], seed=seed) for seed in range(3)]
    assert [o.is_flagged for o in verify_alone(logits, plan)] == [False, True, False]
    assert [o.is_flagged for o in verify_sharded(logits, plan, 2)] == [False, True, False]


def test_a_tree_is_walked_down_to_the_plain_tokens():
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(4))
    first = verify_alone(logits[:1], [plan_of([0])])[0].tokens[0]
    second = verify_alone(logits[2:3], [plan_of([0], position=11)])[0].tokens[0]
    other = (first + 1) % 30
    tokens, parents = [0, other, first, 5, (second + 1) % 30, second], [-1, 0, 0, 1, 2, 2]
    outcome = verify_alone(logits[:6], [plan_of(tokens, parents)])[0]
    assert outcome.accepted_rows == [2, 5] and outcome.tokens[:2] == [first, second]


NUM_DRAWS = 200_000
TARGET = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -0.5, 0.2], [0.1, 2.0, 0.3, -2.0, 1.0, 0.0, 0.5, -1.0]])


def drawn_pairs(mode: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """First tokens of many seeds, and second tokens where the draft was accepted; the drafter always says 4."""
    bad_draft = 4
    firsts, seconds = [], []
    batch = 4000
    logits = TARGET.repeat(batch, 1)
    for start in range(0, NUM_DRAWS, batch):
        plan = [
            plan_of([0, bad_draft], seed=seed * 2654435761 % 2**64, mode=mode, temperature=temperature)
            for seed in range(start, start + batch)
        ]
        for outcome in verify_alone(logits, plan):
            firsts.append(outcome.tokens[0])
            if len(outcome.tokens) > 1:
                seconds.append(outcome.tokens[1])
    return np.bincount(firsts, minlength=8), np.bincount(seconds, minlength=8)


def assert_law(counts: np.ndarray, logits: torch.Tensor) -> None:
    expected = logits.double().softmax(-1).numpy() * counts.sum()
    assert chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mode", [COUPLED, REJECTION], ids=["coupled", "rejection"])
def test_two_hundred_thousand_draws_follow_the_target_with_a_bad_drafter(mode):
    first, second = drawn_pairs(mode)
    assert_law(first, TARGET[0])
    assert second.sum() > 1000
    assert_law(second, TARGET[1])


@pytest.mark.slow
def test_the_distribution_test_fails_when_drafts_are_accepted_too_often(monkeypatch):
    def too_likely(*arguments):
        return right(*arguments[:3], arguments[3] * 0.5, *arguments[4:])

    right = verify_module.verify_ops.verify_combine
    monkeypatch.setattr(verify_module.verify_ops, "verify_combine", too_likely)
    first, _ = drawn_pairs(REJECTION)
    with pytest.raises(AssertionError):
        assert_law(first, TARGET[0])


@pytest.mark.slow
def test_the_distribution_test_fails_when_drafts_are_accepted_without_the_draw(monkeypatch):
    def always_accepted(logits, *arguments):
        partials = right(logits, *arguments)
        partials[::2, 1] = 4.0  # the draft of every root
        return partials

    right = verify_module.verify_ops.verify_coupled
    monkeypatch.setattr(verify_module.verify_ops, "verify_coupled", always_accepted)
    first, _ = drawn_pairs(COUPLED)
    with pytest.raises(AssertionError):
        assert_law(first, TARGET[0])


DRAFT_SCORES = np.array(
    [[[0.0, 1.5, -1.0, 0.5]] * 4, [[2.0, 0.0, 0.0, 1.0], [0.0, 2.0, 0.0, 0.0]] * 2], dtype=np.float32
)
DRAFT_IDS = np.array([[0, 4, 5, 7], [1, 2, 4, 6]])


def drawn_by_selector(
    num_draws: int, keeps_distribution: bool, stated: float = 1.0
) -> tuple[np.ndarray, np.ndarray, float]:
    """Counts of first and second tokens, and the mean number accepted, of drafts that a selector's walk draws.

    `stated` tempers the probabilities that are sent along; 1 is the truth.
    """
    firsts, seconds, accepted = [], [], 0
    batch = 2000
    logits = torch.cat((TARGET, TARGET[:1])).repeat(batch, 1)
    for start in range(0, num_draws, batch):
        plan = []
        keys = [seed * 2654435761 % 2**64 for seed in range(start, start + batch)]
        all_ids = np.tile(DRAFT_IDS, (batch, 1, 1))
        scores = np.tile(DRAFT_SCORES, (batch, 1, 1, 1))
        seeds = torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int64))
        every = torch.ones(batch, dtype=torch.float64), seeds, torch.full((batch,), 11)
        walked = draft_ops.walk_candidates(torch.from_numpy(scores).float(), torch.from_numpy(all_ids), *every)
        for key, ids, chances in zip(keys, *(column.numpy() for column in walked), strict=True):
            kept = {"num_candidates": 4, "candidate_ids": ids.flatten().tolist()} if keeps_distribution else {}
            if kept:
                kept["candidate_probs"] = np.exp(chances * stated).flatten().tolist()
            plan.append(plan_of([0, *ids[:, 0].tolist()], seed=key, mode=REJECTION, position=10, **kept))
        for outcome in verify_alone(logits, plan):
            accepted += len(outcome.accepted_rows)
            firsts.append(outcome.tokens[0])
            seconds += outcome.tokens[1:2]
    return np.bincount(firsts, minlength=8), np.bincount(seconds, minlength=8), accepted / num_draws


@pytest.mark.parametrize("keeps_distribution", [True, False], ids=["distribution sent along", "taken as one-hot"])
def test_drafts_that_a_selector_draws_leave_the_law_as_it_is(keeps_distribution):
    first, second, _ = drawn_by_selector(20_000, keeps_distribution)
    assert_law(first, TARGET[0])
    assert_law(second, TARGET[1])


def test_knowing_the_draft_distribution_accepts_more():
    assert drawn_by_selector(4000, True)[2] > 1.3 * drawn_by_selector(4000, False)[2]


def test_the_law_is_broken_when_the_distribution_sent_along_is_not_the_one_drawn_from():
    first, _, _ = drawn_by_selector(20_000, True, stated=2.0)
    with pytest.raises(AssertionError):
        assert_law(first, TARGET[0])
