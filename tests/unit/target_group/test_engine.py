"""The engine's tokens are plain decoding's, whatever is drafted; bad entries leave their neighbours alone."""

import pytest
import torch

from dflash_ray.sampling.parameters import REJECTION
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.step import EntryStatus
from tests.steps import PROMPT, VOCAB, garbage, opening, oracle, plain, run, step_of, tokens_of, verify_step
from tests.unit.target_group.conftest import CONFIG

OK, STALE, UNKNOWN, NO_PAGES, FAILED, ENDED = EntryStatus
PENALISED = {"temperature": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2}


def new_engine(runner, num_pages: int = CONFIG.target.num_pages) -> Engine:
    return Engine(runner, num_pages, CONFIG.target.page_size, 256)


def first_token(engine: Engine, start=None) -> list[int]:
    """Opens a sequence with its whole prompt; returns its tokens."""
    output = engine.step(step_of([start or opening()], {1: len(PROMPT)}))
    return [*PROMPT, *output.token_ids.tolist()]


def test_plain_decoding_is_transformers_greedy(runner, tiny_target):
    got = run(new_engine(runner), opening(), plain)
    ids = torch.tensor([PROMPT])
    expected = tiny_target.load_model().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
    )
    assert got == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 8, "min_p": 0.02},
        {"temperature": 1.3, "top_p": 0.8, "presence_penalty": 0.6, "frequency_penalty": 0.4},
        {"temperature": 0.9, "repetition_penalty": 1.3, "bias_ids": [4], "bias_values": [2.5]},
        {"repetition_penalty": 1.5, "frequency_penalty": 1.0},
    ],
    ids=["greedy", "T=0.7", "top-k min-p", "top-p penalties", "repetition bias", "greedy penalties"],
)
def test_drafts_never_change_a_token(runner, sampling):
    engine = new_engine(runner)
    truth = run(engine, opening(**sampling), plain)
    for draft_of in (garbage, oracle(truth, len(PROMPT)), oracle(truth, len(PROMPT), wrong_at=2)):
        assert run(engine, opening(**sampling), draft_of) == truth


def test_a_perfect_draft_is_accepted_whole_and_a_wrong_one_up_to_the_fault(runner):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    tokens = first_token(engine)
    output = engine.step(verify_step({1: tokens}, {1: truth[1:5]}))
    assert output.num_accepted[0] == 4 and output.token_ids.tolist() == truth[1:6]
    tokens += output.token_ids.tolist()
    wrong = [truth[6], (truth[7] + 1) % VOCAB, truth[8]]
    output = engine.step(verify_step({1: tokens}, {1: wrong}))
    assert output.num_accepted[0] == 1 and output.token_ids.tolist() == truth[6:8]


def test_stop_tokens_and_limits_cut_inside_an_accepted_run(runner):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    stop = truth[12]
    at = truth.index(stop)
    perfect = oracle(truth, len(PROMPT))
    assert run(engine, opening(stops=[stop]), perfect) == truth[: at + 1]
    assert run(engine, opening(max_new=7), perfect) == truth[:7]


def test_stop_tokens_are_banned_until_min_new_tokens(runner):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    for draft_of in (plain, oracle(truth, len(PROMPT))):
        got = run(engine, opening(stops=[truth[2]], min_new=9), draft_of)
        assert len(got) >= 9 and truth[2] not in got[:9]


def test_a_sequence_that_is_opened_again_with_its_tokens_goes_on_with_the_same_ones(runner):
    engine = new_engine(runner)
    for sampling in ({}, {"temperature": 1.0, "frequency_penalty": 0.5}):
        truth = run(engine, opening(**sampling), plain)
        again = opening(tokens=[*PROMPT, *truth[:9]], prompt_len=len(PROMPT), **sampling)
        assert run(engine, again, garbage) == truth[9:]


def test_bad_entries_get_their_status_and_neighbours_their_tokens(runner):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    opened = [opening(1), opening(2), opening(3), opening(4, tokens=[VOCAB])]
    output = engine.step(step_of(opened, dict.fromkeys((1, 2, 3, 4), len(PROMPT))))
    assert output.statuses.tolist() == [OK, OK, OK, FAILED] and "below" in output.errors[0]
    known = {i: [*PROMPT, truth[0]] for i in (1, 2, 3)} | {2: PROMPT, 9: PROMPT}
    output = engine.step(verify_step(known, {1: truth[1:3], 2: [1], 9: [1], 3: [VOCAB]}))
    assert output.statuses.tolist() == [OK, STALE, UNKNOWN, FAILED]
    assert output.token_ids.tolist() == truth[1:4]
    assert output.committed_lens.tolist() == [len(PROMPT) + 4, len(PROMPT) + 1, 0, len(PROMPT) + 1]


def test_a_sequence_that_is_in_a_step_twice_runs_once(runner):
    engine = new_engine(runner)
    output = engine.step(step_of([opening()], [(1, 3), (1, 2)]))
    assert output.statuses.tolist() == [OK, FAILED] and "twice" in output.errors[0]
    assert engine.step(step_of(prefill={1: 4})).num_tokens.tolist() == [1]


def test_a_sequence_that_is_opened_again_begins_anew(runner):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    first_token(engine, opening(frequency_penalty=0.5))
    assert first_token(engine)[len(PROMPT) :] == truth[:1]
    assert engine.num_sequences == 1


def test_a_sequence_ends_with_the_models_context_whatever_the_router_asks(runner):
    engine = new_engine(runner)
    known = (PROMPT * 40)[:256]
    output = engine.step(step_of([opening(tokens=known, max_new=500)], {1: 256}))
    assert output.finishes.tolist() == [2] and output.num_tokens.tolist() == [1]
    output = engine.step(step_of(prefill={1: 1}))
    assert output.statuses.tolist() == [FAILED] and "context" in output.errors[0]
    output = engine.step(verify_step({1: [*known, 0]}, {1: []}))
    assert output.statuses.tolist() == [ENDED] and output.num_tokens.tolist() == [0]


@pytest.mark.parametrize("parents", [[1, 0], [0, 2], [0, -1]])
def test_drafts_before_their_parents_end_their_sequence_with_a_clear_text(runner, parents):
    engine = new_engine(runner)
    tokens = first_token(engine)
    output = engine.step(verify_step({1: tokens}, {1: [3, 4]}, parents=parents))
    assert output.statuses.tolist() == [FAILED] and "parent" in output.errors[0]


def test_drawn_drafts_that_branch_end_their_sequence_with_a_clear_text(runner):
    engine = new_engine(runner)
    tokens = first_token(engine, opening(temperature=1.0, mode=REJECTION))
    drawn = {"num_candidates": [1], "candidate_ids": [3, 4], "candidate_probs": [1.0, 1.0]}
    output = engine.step(verify_step({1: tokens}, {1: [3, 4]}, parents=[0, 0], **drawn))
    assert output.statuses.tolist() == [FAILED] and "chain" in output.errors[0]


def test_drawn_drafts_are_judged_by_their_distribution(runner):
    engine = new_engine(runner)
    tokens = first_token(engine, opening(temperature=1.0, mode=REJECTION))
    # Each draft was nearly impossible to be drawn, so the target has it more often than the drafter did.
    drawn = {"num_candidates": [2], "candidate_ids": [3, 9, 4, 9], "candidate_probs": [1e-13, 1.0, 1e-13, 1.0]}
    output = engine.step(verify_step({1: tokens}, {1: [3, 4]}, **drawn))
    assert output.num_accepted[0] == 2 and output.token_ids[:2].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("ids", "probs", "fault"),
    [([9, 3, 4, 9], [1.0] * 4, "first candidate"), ([3, 9, 4, 9], [1.0, 1.0, 1.0, 1.6], "at most 0"),
     ([3, 9, 4, 9], [1.0, 1.0, 1.0, float("nan")], "at most 0")],
)  # fmt: skip
def test_a_malformed_draft_distribution_ends_its_sequence_with_a_clear_text(runner, ids, probs, fault):
    engine = new_engine(runner)
    tokens = first_token(engine)
    step = verify_step({1: tokens}, {1: [3, 4]}, num_candidates=[2], candidate_ids=ids, candidate_probs=probs)
    output = engine.step(step)
    assert output.statuses.tolist() == [FAILED] and fault in output.errors[0]


def test_drafts_of_entries_that_do_not_run_leave_those_of_their_neighbours_in_place(runner):
    engine = new_engine(runner)
    message = {"temperature": 1.0, "mode": REJECTION}
    engine.step(step_of([opening(i, **message) for i in (1, 2)], {1: 7, 2: 7}))
    base = len(PROMPT) + 1
    drawn = {"num_candidates": [2, 0, 1], "candidate_ids": [8, 9, 8, 9, 3, 4]}
    drawn["candidate_probs"] = [1.0, 0, 1.0, 0, 1e-13, 1e-13]
    # Sequence 9 is unknown, and 1 stale.
    output = engine.step(step_of(verify={9: (base, [8, 8]), 1: (5, [7]), 2: (base, [3, 4])}, **drawn))
    assert output.statuses.tolist() == [UNKNOWN, STALE, OK]
    assert output.num_accepted.tolist() == [0, 0, 2] and output.token_ids[:2].tolist() == [3, 4]


def test_a_sequence_without_pages_waits_and_its_neighbour_goes_on(runner):
    engine = new_engine(runner, num_pages=4)
    other = opening(2, tokens=[7, 8, 9, 10, 11, 12, 13, 14, 15])
    output = engine.step(step_of([opening(1), other], {1: len(PROMPT), 2: 9}))
    assert output.statuses.tolist() == [OK, NO_PAGES]
    engine.close([1])
    output = engine.step(step_of(prefill={2: 9}))
    assert output.statuses.tolist() == [OK] and output.num_tokens[0] == 1


def test_more_sequences_than_the_first_slots_get_the_tokens_that_they_get_alone(runner):
    engine = new_engine(runner)
    truth = {seed: run(engine, opening(seed=seed, max_new=4, **PENALISED), plain) for seed in range(3)}
    known = {at: list(PROMPT) for at in range(150)}
    for first in range(0, 150, 50):
        opened = [opening(at, seed=at % 3, max_new=4, **PENALISED) for at in range(first, first + 50)]
        output = engine.step(step_of(opened, {one.sequence_id: len(PROMPT) for one in opened}))
        for at, tokens in tokens_of(output).items():
            known[at] += tokens
    for _ in range(3):
        output = engine.step(verify_step(known, {at: [] for at in known}))
        for at, tokens in tokens_of(output).items():
            known[at] += tokens
    assert {at: tokens[len(PROMPT) :] for at, tokens in known.items()} == {at: truth[at % 3] for at in known}


def test_logits_that_are_not_finite_end_one_sequence_only(runner, monkeypatch):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    rank_logits = runner._model.rank_logits
    monkeypatch.setattr(
        runner._model, "rank_logits", lambda hidden: rank_logits(hidden).index_fill(0, torch.tensor([1]), torch.nan)
    )
    output = engine.step(step_of([opening(1), opening(2)], {1: len(PROMPT), 2: len(PROMPT)}))
    assert output.statuses.tolist() == [OK, FAILED] and "finite" in output.errors[0]
    assert output.token_ids.tolist() == truth[:1]


def test_log_probabilities_are_of_the_raw_logits_and_best_first(runner, tiny_target):
    engine = new_engine(runner)
    asking = opening(temperature=0.5, top_k=1, num_logprobs=3)
    output = engine.step(step_of([opening(2), asking], {2: 7, 1: len(PROMPT)}))
    with torch.inference_mode():
        expected = tiny_target.load_model()(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    best, ids = expected.topk(3)
    (scores,) = output.logprobs
    assert scores.top_ids.tolist() == [ids.tolist()]
    assert scores.top_logprobs[0] == pytest.approx(best.tolist(), abs=1e-4)
    assert scores.chosen.tolist() == pytest.approx([best[0].item()], abs=1e-4)


@pytest.mark.parametrize("chunk", [2, 3, 50])
def test_a_prompts_own_log_probabilities_are_those_of_transformers_however_it_is_cut(runner, tiny_target, chunk):
    engine = new_engine(runner)
    opened, others = [opening(num_prompt_logprobs=2), opening(2)], [(2, 7)]
    parts = []
    for _ in range(0, len(PROMPT), chunk):
        output = engine.step(step_of(opened, [*others, (1, chunk)]))
        parts += output.prompt_logprobs
        opened, others = [], []
    assert output.num_tokens[-1] == 1
    with torch.inference_mode():
        expected = tiny_target.load_model()(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    position = 1
    for part in parts:
        assert (part.sequence_id, part.start) == (1, position)
        for i, value in enumerate(part.logprobs.chosen.tolist()):
            row = expected[position - 1]
            assert value == pytest.approx(float(row[PROMPT[position]]), abs=1e-4)
            best = row.topk(2)
            assert part.logprobs.top_ids[i].tolist() == best.indices.tolist()
            assert part.logprobs.top_logprobs[i] == pytest.approx(best.values.tolist(), abs=1e-4)
            position += 1
    assert position == len(PROMPT)


def test_a_resumed_sequences_prompt_is_not_scored_again(runner):
    engine = new_engine(runner)
    again = opening(tokens=[*PROMPT, 9], prompt_len=len(PROMPT), num_prompt_logprobs=0)
    output = engine.step(step_of([again], {1: 8}))
    assert output.num_tokens[0] == 1 and not output.prompt_logprobs
