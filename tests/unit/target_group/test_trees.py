"""Trees of drafts change the number of steps alone: tokens, log-probabilities and features are plain decoding's."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash_ray.sampling.parameters import REJECTION
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.step import EntryStatus
from tests.steps import PROMPT, VOCAB, opening, plain, run, step_of, tokens_of, verify_step
from tests.trees import random_tree, random_trees
from tests.unit.target_group.conftest import CONFIG
from tests.unit.target_group.test_engine import PENALISED, first_token, new_engine
from tests.unit.target_group.test_features import generate, runner_with_taps, wanting_features
from tests.unit.target_group.test_features import new_engine as engine_with_features

SAMPLINGS = (
    {},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 8, "min_p": 0.02},
    {"temperature": 1.3, "top_p": 0.8, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    {"temperature": 0.9, "repetition_penalty": 1.3, "bias_ids": [4], "bias_values": [2.5]},
    {"repetition_penalty": 1.5, "frequency_penalty": 1.0},
)
# Engines are as good as new after every sequence.
of_trees = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(seed=st.integers(0, 1 << 20), sampling=st.sampled_from(SAMPLINGS))
@of_trees
def test_trees_never_change_a_token(runner, seed, sampling):
    engine = new_engine(runner)
    truth = run(engine, opening(**sampling), plain)
    assert run(engine, opening(**sampling), random_trees(truth, len(PROMPT), seed)) == truth


@given(seed=st.integers(0, 1 << 20))
@of_trees
def test_trees_never_change_a_token_where_layers_run_as_transformers_has_them(
    process_group, tiny_target, monkeypatch, seed
):
    monkeypatch.setattr("dflash_ray.target_group.model.obstacle", lambda base: "the test wants it so")
    engine = new_engine(GroupRunner(RankModel(tiny_target, CONFIG, 0, 1), SingleRank()))
    for sampling in ({}, PENALISED):
        truth = run(engine, opening(**sampling), plain)
        assert run(engine, opening(**sampling), random_trees(truth, len(PROMPT), seed)) == truth


def test_a_path_through_later_siblings_is_accepted_and_decoding_goes_on_from_its_rows(runner):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    tokens = first_token(engine)
    wrong = [(token + 1) % VOCAB for token in truth]
    nodes = [wrong[1], truth[1], wrong[2], wrong[2], truth[2], truth[3]]
    output = engine.step(verify_step({1: tokens}, {1: nodes}, parents=[0, 0, 1, 2, 2, 5]))
    assert output.num_accepted[0] == 3 and output.token_ids.tolist() == truth[1:5]
    tokens += output.token_ids.tolist()
    output = engine.step(verify_step({1: tokens}, {1: truth[5:9]}))
    assert output.num_accepted[0] == 4 and output.token_ids.tolist() == truth[5:10]


def test_a_stop_token_ends_a_sequence_on_a_path(runner):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    stop = truth[12]
    end = truth.index(stop) + 1
    assert run(engine, opening(stops=[stop]), random_trees(truth, len(PROMPT), 3)) == truth[:end]
    assert run(engine, opening(max_new=7), random_trees(truth, len(PROMPT), 4)) == truth[:7]


def test_chains_trees_and_prompts_share_a_pass(runner):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    rng = random.Random(5)
    long = (PROMPT * 9)[:50]
    known = {at: list(PROMPT) for at in (1, 2, 3)}
    engine.step(step_of([opening(at) for at in known] + [opening(9, tokens=long)], dict.fromkeys(known, len(PROMPT))))
    for tokens in known.values():
        tokens.append(truth[0])
    for chunk in (7, 20, 23):
        left = {at: truth[len(tokens) - len(PROMPT) :] for at, tokens in known.items()}
        trees = {1: random_tree(rng, left[1]), 2: (left[2][:3], [0, 1, 2]), 3: random_tree(rng, left[3])}
        step = step_of(
            prefill={9: chunk},
            verify={at: (len(known[at]), nodes) for at, (nodes, _) in trees.items()},
            parents=[parent for _, parents in trees.values() for parent in parents],
        )
        for at, tokens in tokens_of(engine.step(step)).items():
            if at in known:
                known[at] += tokens
    for tokens in known.values():
        assert tokens == [*PROMPT, *truth][: len(tokens)]
    assert len(known[2]) > len(PROMPT) + 4


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "frequency_penalty": 0.5}], ids=["greedy", "seeded"])
def test_log_probabilities_are_those_of_plain_decoding(runner, sampling):
    engine = new_engine(runner)

    def scored(draft_of):
        known, found = first_token(engine, opening(num_logprobs=2, **sampling)), []
        while len(known) < len(PROMPT) + 20:
            nodes, parents = draft_of(known)
            output = engine.step(verify_step({1: known}, {1: nodes}, parents=parents))
            known += output.token_ids.tolist()
            (scores,) = output.logprobs
            found += zip(scores.chosen.tolist(), scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
        return known, found

    tokens, expected = scored(lambda _: ([], []))
    _, got = scored(random_trees([*tokens[len(PROMPT) :], 0, 0, 0, 0], len(PROMPT), 8))
    assert got[:19] == expected[:19]


def test_features_and_the_rows_behind_them_are_to_the_bit_those_of_plain_decoding(process_group, tiny_target):
    engine, _ = engine_with_features(runner_with_taps(tiny_target))
    tokens, rows = generate(engine, wanting_features(), plain, num_steps=40)
    truth = tokens[len(PROMPT) :]
    engine.close([1])
    for seed in range(4):
        trees = random_trees(truth, len(PROMPT), seed)
        got = decode_with_trees(engine, trees)
        assert torch.equal(got, rows[: len(got)]) and len(got) >= 30
        engine.close([1])


def decode_with_trees(engine, trees) -> torch.Tensor:
    """Features of an answer's first rows."""
    tokens, parts = list(PROMPT), []
    output = engine.step(step_of([wanting_features()], {1: len(PROMPT)}))
    while True:
        kept = output.features
        parts.append(kept.rows[: int(kept.num_rows[0])])
        tokens += output.token_ids.tolist()
        if len(tokens) >= len(PROMPT) + 25:
            return torch.cat(parts)
        nodes, parents = trees(tokens)
        output = engine.step(verify_step({1: tokens}, {1: nodes}, parents=parents))


def test_the_rows_of_a_tree_need_their_pages_and_the_models_context(runner):
    engine = new_engine(runner, num_pages=3)
    tokens = first_token(engine)
    wide = ([1] * 6, [0] * 6)
    output = engine.step(verify_step({1: tokens}, {1: wide[0]}, parents=wide[1]))
    assert output.statuses.tolist() == [EntryStatus.NO_PAGES]
    output = engine.step(verify_step({1: tokens}, {1: wide[0][:4]}, parents=wide[1][:4]))
    assert output.statuses.tolist() == [EntryStatus.OK]
    engine = new_engine(runner)
    known = (PROMPT * 40)[:250]
    known += engine.step(step_of([opening(tokens=known)], {1: 250})).token_ids.tolist()
    output = engine.step(verify_step({1: known}, {1: wide[0]}, parents=wide[1]))
    assert output.statuses.tolist() == [EntryStatus.FAILED] and "context" in output.errors[0]


def test_a_tree_of_a_sequence_that_is_verified_by_rejection_is_judged_by_first_children(runner):
    engine = new_engine(runner)
    tokens = first_token(engine, opening(temperature=1.0, mode=REJECTION))
    output = engine.step(verify_step({1: tokens}, {1: [3, 4, 5]}, parents=[0, 0, 1]))
    assert output.statuses.tolist() == [EntryStatus.OK] and output.num_tokens[0] == output.num_accepted[0] + 1


@given(st.integers(0, 1 << 20))
@of_trees
def test_moved_rows_leave_the_other_sequences_rows_alone(runner, seed):
    engine = new_engine(runner)
    rng = random.Random(seed)
    truth = {at: run(engine, opening(at, seed=at, temperature=0.8), plain) for at in (1, 2)}
    engine.step(step_of([opening(at, seed=at, temperature=0.8) for at in truth], dict.fromkeys(truth, len(PROMPT))))
    known = {at: [*PROMPT, text[0]] for at, text in truth.items()}
    for _ in range(6):
        trees = {at: random_tree(rng, text[len(known[at]) - len(PROMPT) :], 6) for at, text in truth.items()}
        columns = {"parents": np.concatenate([parents for _, parents in trees.values()])}
        output = engine.step(verify_step(known, {at: nodes for at, (nodes, _) in trees.items()}, **columns))
        for at, tokens in tokens_of(output).items():
            known[at] += tokens
    for at, tokens in known.items():
        assert tokens[len(PROMPT) :] == truth[at][: len(tokens) - len(PROMPT)]
