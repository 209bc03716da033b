"""Drafts that the target keeps itself: verified by steps that were sent before they were made, to no other end."""

from __future__ import annotations

import numpy as np
import pytest

from dflash_ray.sampling.parameters import REJECTION
from dflash_ray.target_group.engine import Engine
from tests.own_drafter import Guessing, run_ahead
from tests.steps import PROMPT, VOCAB, opening, plain, run, step_of, verify_step
from tests.unit.target_group.conftest import CONFIG
from tests.unit.target_group.test_engine import ENDED, NO_PAGES, OK, PENALISED, STALE, UNKNOWN, new_engine

SAMPLINGS = ({}, {"temperature": 0.8}, PENALISED | {"top_p": 0.8})
TEXTS = {1: PROMPT, 2: [*PROMPT[:4], 2], 3: [*PROMPT, 9, 9]}


def drafted(runner, truth, rate=0.7, num_pages=CONFIG.target.num_pages) -> Engine:
    return Engine(runner, num_pages, CONFIG.target.page_size, 256, Guessing(truth, rate))


def openings(**options) -> list:
    return [opening(at, tokens, max_new=20 + at, **options) for at, tokens in TEXTS.items()]


def answers(runner, **options) -> dict[int, list[int]]:
    engine = new_engine(runner)
    return {one.sequence_id: run(engine, one, plain) for one in openings(**options)}


def whole(texts: dict[int, list[int]]) -> dict[int, list[int]]:
    return {at: [*TEXTS[at], *text] for at, text in texts.items()}


@pytest.mark.parametrize("tree_width", [1, 2])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "coupled", "penalties"])
def test_steps_ahead_with_own_drafts_give_plain_decodings_tokens(runner, sampling, tree_width):
    truth = answers(runner, **sampling)
    engine = drafted(runner, whole(truth))
    got, num_accepted = run_ahead(engine, openings(**sampling), tree_width=tree_width)
    assert got == truth and num_accepted > 15


def test_who_ends_at_a_stop_token_takes_no_row_of_the_step_ahead(runner):
    stops = [answers(runner)[2][9]]
    truth = answers(runner, stops=stops)
    assert len(truth[2]) <= 10
    got, num_accepted = run_ahead(drafted(runner, whole(truth), rate=1.0), openings(stops=stops))
    assert got == truth and num_accepted > 5


def test_drawn_drafts_are_verified_ahead_as_if_the_router_had_brought_them(runner):
    options = {"max_new": 24, "temperature": 0.9, "mode": REJECTION}
    drafter = Guessing({1: [*PROMPT, *range(VOCAB)]}, is_drawn=True)
    engine = Engine(runner, CONFIG.target.num_pages, CONFIG.target.page_size, 256, drafter)
    tokens = list(PROMPT)
    output = engine.step(step_of([opening(1, tokens, **options)], {1: len(tokens)}, draft={1: 4}))
    num_drawn = 0
    while True:
        tokens += output.token_ids.tolist()
        if output.finishes[0]:
            break
        room = max(0, len(PROMPT) + 24 - len(tokens) - 1)
        [block] = output.colocated_drafts
        assert block.is_drawn
        num_drawn += min(room, len(block.candidate_ids))
        ids, log_probs = block.candidate_ids[:room], block.log_probs[:room]
        columns = {"num_candidates": [ids.shape[1]], "candidate_ids": ids.ravel().tolist()}
        columns["candidate_probs"] = np.exp(log_probs.ravel().astype(np.float64)).astype(np.float32)
        output = engine.step(verify_step({1: tokens}, {1: block.draft_ids[:room]}, draft={1: 4}, **columns))
    engine.close([1])
    assert run_ahead(engine, [opening(1, PROMPT, **options)])[0] == {1: tokens[len(PROMPT) :]} and num_drawn > 10


@pytest.fixture
def truth(runner):
    return answers(runner)


@pytest.fixture
def engine(runner, truth):
    """Three sequences with their first tokens, and three own drafts each that are all right."""
    engine = drafted(runner, whole(truth), rate=1.0)
    lens = {at: len(tokens) for at, tokens in TEXTS.items()}
    engine.step(step_of(openings(), lens, draft=dict.fromkeys(lens, 3)))
    return engine


def verify(own, ahead=False, lens=None, draft=None, least=0.0, drafts=None):
    """A step of sequences with their first tokens."""
    lens = {at: len(tokens) + 1 for at, tokens in TEXTS.items()} | (lens or {})
    brought = {at: (lens[at], (drafts or {}).get(at, [])) for at in own}
    return step_of(verify=brought, own=own, draft=draft, options={"is_ahead": ahead, "least_own_log_prob": least})


def test_an_entry_verifies_as_many_as_it_names_and_there_are(engine, truth):
    output = engine.step(verify({1: 2, 2: 9, 3: 0}))
    assert output.own_counts.tolist() == [2, 3, 0] and output.num_accepted.tolist() == [2, 3, 0]
    assert output.own_log_probs.tolist() == [-0.5] * 5 and not len(output.own_parents)
    assert output.token_ids.tolist() == [*truth[1][1:4], *truth[2][1:5], truth[3][1]]


def test_drafts_that_were_not_made_again_leave_the_anchor_alone(engine, truth):
    engine.step(verify({1: 2, 2: 2, 3: 2}, draft={1: 3}))
    output = engine.step(verify({1: 3, 2: 3}, ahead=True))
    assert output.own_counts.tolist() == [3, 0] and output.num_tokens.tolist() == [4, 1]
    assert output.token_ids.tolist() == [*truth[1][4:8], truth[2][4]]


def test_drafts_are_cut_before_the_first_that_is_too_unlikely(engine):
    output = engine.step(verify({1: 3, 2: 1, 3: 3}, least=-1.1))
    assert output.own_counts.tolist() == [2, 1, 2] and len(output.own_log_probs) == 5


def test_drafts_beyond_the_last_token_are_left_out(runner, truth):
    engine = drafted(runner, whole(truth), rate=1.0)
    engine.step(step_of([opening(1, PROMPT, max_new=3)], {1: len(PROMPT)}, draft={1: 4}))
    output = engine.step(verify({1: 4}))
    assert output.own_counts.tolist() == [1] and output.num_tokens.tolist() == [2] and output.finishes[0]
    output = engine.step(verify({1: 4}, ahead=True))
    assert output.statuses.tolist() == [ENDED] and output.num_tokens.tolist() == [0]


def test_own_drafts_and_brought_ones_share_a_step(engine, truth):
    wrong = (truth[2][2] + 1) % VOCAB
    output = engine.step(verify({1: 3, 2: 0, 3: 2}, drafts={2: [truth[2][1], wrong]}))
    assert output.num_accepted.tolist() == [3, 1, 2] and output.own_counts.tolist() == [3, 0, 2]
    assert output.token_ids.tolist() == [*truth[1][1:5], *truth[2][1:3], *truth[3][1:4]]


def test_a_step_ahead_is_stale_where_its_sequence_has_another_past(engine):
    known = len(PROMPT) + 1
    statuses = []
    for ahead, base in [(False, known - 1), (True, known), (True, known - 1), (True, known - 1), (True, known)]:
        output = engine.step(verify({1: 2}, ahead=ahead, lens={1: base}))
        statuses.append(output.statuses[0])
    assert statuses == [STALE, STALE, OK, STALE, OK]
    assert engine.step(verify({7: 2}, ahead=True, lens={7: 3})).statuses.tolist() == [UNKNOWN]


def test_a_step_ahead_of_one_that_found_no_page_is_stale(runner, truth):
    engine = drafted(runner, whole(truth), rate=1.0, num_pages=3)
    engine.step(step_of([opening(1)], {1: 7}, draft={1: 3}))
    others = [opening(2, [5])]
    engine.step(step_of(others, {2: 1}))
    known = len(PROMPT) + 1
    assert engine.step(verify({1: 3}, lens={1: known})).statuses.tolist() == [NO_PAGES]
    engine.close([2])
    assert engine.step(verify({1: 3}, ahead=True, lens={1: known})).statuses.tolist() == [STALE]
    output = engine.step(verify({1: 3}, lens={1: known}))
    assert output.statuses.tolist() == [OK] and output.num_accepted.tolist() == [3]


def test_drafts_of_a_sequence_that_was_closed_are_no_other_ones(engine):
    engine.close([1])
    again = opening(4, PROMPT, max_new=20)
    engine.step(step_of([again], {4: len(PROMPT)}))
    output = engine.step(verify({4: 3}, lens={4: len(PROMPT) + 1}))
    assert output.statuses.tolist() == [OK] and output.own_counts.tolist() == [0]


def test_a_group_without_a_drafter_has_no_own_drafts(runner):
    engine = new_engine(runner)
    engine.step(step_of([opening()], {1: len(PROMPT)}))
    output = engine.step(verify({1: 3}))
    assert output.own_counts.tolist() == [0] and output.num_tokens.tolist() == [1]


@pytest.mark.parametrize(
    ("own", "drafts", "least", "fault"),
    [
        ({1: 2}, {1: [5]}, 0.0, "either num_drafts or num_own_drafts"),
        ({1: 2}, {}, 0.5, "least_own_log_prob"),
        ({1: 2}, {}, np.nan, "least_own_log_prob"),
        ({1: 5000}, {}, 0.0, "rows are more than"),
    ],
)
def test_what_does_not_belong_together_is_refused(own, drafts, least, fault):
    with pytest.raises(ValueError, match=fault):
        verify(own, drafts=drafts, least=least)
