"""The engine's tokens are plain decoding's, whatever is drafted; bad entries leave their neighbours alone."""

import pytest
import torch

from dflash_ray.pb import common_pb2, target_pb2
from dflash_ray.target_group.engine import Engine
from tests.unit.target_group.conftest import CONFIG

VOCAB = 96
OK, STALE, UNKNOWN, NO_PAGES, FAILED = (
    target_pb2.ENTRY_STATUS_OK,
    target_pb2.ENTRY_STATUS_STALE,
    target_pb2.ENTRY_STATUS_UNKNOWN,
    target_pb2.ENTRY_STATUS_NO_PAGES,
    target_pb2.ENTRY_STATUS_FAILED,
)
PROMPT = [5, 17, 80, 3, 44, 9, 61]


def new_engine(runner, num_pages: int = CONFIG.target.num_pages) -> Engine:
    return Engine(runner, num_pages, CONFIG.target.page_size, 256, VOCAB)


def opening(sequence_id=1, tokens=PROMPT, prompt_len=None, max_new=40, stops=(), min_new=0, **sampling):
    values = {"top_p": 1.0, "repetition_penalty": 1.0, "seed": 11} | sampling
    return target_pb2.OpenSequence(
        sequence_id=sequence_id,
        token_ids=tokens,
        prompt_len=prompt_len or len(tokens),
        sampling=common_pb2.SamplingParams(**values),
        stopping=common_pb2.StoppingParams(max_new_tokens=max_new, min_new_tokens=min_new, stop_token_ids=stops),
    )


def verify_step(known: dict[int, list[int]], drafts: dict[int, list[int]]) -> target_pb2.Step:
    step = target_pb2.Step()
    for sequence_id, draft in drafts.items():
        step.verify_ids.append(sequence_id)
        step.base_lens.append(len(known[sequence_id]))
        step.num_drafts.append(len(draft))
        step.draft_token_ids.extend(draft)
        step.draft_parents.extend(range(len(draft)))
    return step


def run(engine: Engine, message: target_pb2.OpenSequence, draft_of, chunk: int = 3) -> list[int]:
    """Generates one sequence to its end; `draft_of(tokens)` drafts for each step."""
    tokens = list(message.token_ids)
    step = target_pb2.Step(open=[message])
    done = 0
    while done < len(message.token_ids):
        step.prefill_ids.append(message.sequence_id)
        step.prefill_lens.append(chunk)
        result = engine.step(step).result
        done += chunk
        step = target_pb2.Step()
    finished = result.finish_reasons[0]
    tokens += result.token_ids
    while not finished:
        draft = draft_of(tokens)[: max(0, message.prompt_len + message.stopping.max_new_tokens - len(tokens) - 1)]
        result = engine.step(verify_step({message.sequence_id: tokens}, {message.sequence_id: draft})).result
        assert result.statuses[0] == OK
        tokens += result.token_ids
        finished = result.finish_reasons[0]
    engine.close([message.sequence_id])
    engine.allocator.check_integrity()
    assert engine.allocator.num_free == engine.allocator.num_pages
    return tokens[len(message.token_ids) :]


def plain(tokens):
    return []


def garbage(tokens):
    return [(t * 31 + 7) % VOCAB for t in tokens[-5:]]


def oracle(truth, prompt_len, wrong_at=None):
    def draft(tokens):
        at = len(tokens) - prompt_len
        block = truth[at : at + 5]
        return [t if i != wrong_at else (t + 1) % VOCAB for i, t in enumerate(block)]

    return draft


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
        {"temperature": 0.9, "repetition_penalty": 1.3, "bias_token_ids": [4], "bias_values": [2.5]},
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
    first = engine.step(target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[len(PROMPT)])).result
    tokens = [*PROMPT, *first.token_ids]
    result = engine.step(verify_step({1: tokens}, {1: truth[1:5]})).result
    assert result.num_accepted_drafts[0] == 4 and list(result.token_ids) == truth[1:6]
    tokens += result.token_ids
    wrong = [truth[6], (truth[7] + 1) % VOCAB, truth[8]]
    result = engine.step(verify_step({1: tokens}, {1: wrong})).result
    assert result.num_accepted_drafts[0] == 1 and list(result.token_ids) == truth[6:8]


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
    step = target_pb2.Step(
        open=[opening(1), opening(2), opening(3), opening(4, tokens=[VOCAB])],
        prefill_ids=[1, 2, 3, 4],
        prefill_lens=[len(PROMPT)] * 4,
    )
    result = engine.step(step).result
    assert list(result.statuses) == [OK, OK, OK, FAILED] and "below" in result.errors[0]
    known = {i: [*PROMPT, truth[0]] for i in (1, 2, 3)}
    step = verify_step(known | {2: PROMPT, 9: PROMPT}, {1: truth[1:3], 2: [1], 9: [1], 3: [VOCAB]})
    result = engine.step(step).result
    assert list(result.statuses) == [OK, STALE, UNKNOWN, FAILED]
    assert list(result.token_ids) == truth[1:4]
    assert result.committed_lens[1] == len(PROMPT) + 1


def test_branching_drafts_end_their_sequence_with_a_clear_text(runner):
    engine = new_engine(runner)
    first = engine.step(target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[len(PROMPT)])).result
    step = verify_step({1: [*PROMPT, *first.token_ids]}, {1: [3, 4]})
    step.draft_parents[:] = [0, 0]
    result = engine.step(step).result
    assert list(result.statuses) == [FAILED] and "chains" in result.errors[0]


def test_drawn_drafts_are_judged_by_their_distribution(runner):
    engine = new_engine(runner)
    message = opening(temperature=1.0, mode=common_pb2.VERIFY_MODE_REJECTION)
    first = engine.step(target_pb2.Step(open=[message], prefill_ids=[1], prefill_lens=[len(PROMPT)])).result
    tokens = [*PROMPT, *first.token_ids]
    # Each draft was nearly impossible to be drawn, so the target has it more often than the drafter did.
    step = verify_step({1: tokens}, {1: [3, 4]})
    step.num_draft_candidates.append(2)
    step.draft_candidate_ids.extend([3, 9, 4, 9])
    step.draft_log_probs.extend([-30.0, 0.0, -30.0, 0.0])
    result = engine.step(step).result
    assert result.num_accepted_drafts[0] == 2 and list(result.token_ids[:2]) == [3, 4]


@pytest.mark.parametrize(
    ("ids", "log_probs", "fault"),
    [([3, 9, 4], [0.0] * 3, "4 draft candidates"), ([9, 3, 4, 9], [0.0] * 4, "first candidate"),
     ([3, 9, 4, 9], [0.0, 0.0, 0.0, 0.5], "at most 0"), ([3, 9, 4, 9], [0.0, 0.0, 0.0, float("nan")], "at most 0")],
)  # fmt: skip
def test_a_malformed_draft_distribution_ends_its_sequence_with_a_clear_text(runner, ids, log_probs, fault):
    engine = new_engine(runner)
    first = engine.step(target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[len(PROMPT)])).result
    step = verify_step({1: [*PROMPT, *first.token_ids]}, {1: [3, 4]})
    step.num_draft_candidates.append(2)
    step.draft_candidate_ids.extend(ids)
    step.draft_log_probs.extend(log_probs)
    result = engine.step(step).result
    assert list(result.statuses) == [FAILED] and fault in result.errors[0]


def test_a_sequence_without_pages_waits_and_its_neighbour_goes_on(runner):
    engine = new_engine(runner, num_pages=4)
    other = opening(2, tokens=[7, 8, 9, 10, 11, 12, 13, 14, 15])
    result = engine.step(
        target_pb2.Step(open=[opening(1), other], prefill_ids=[1, 2], prefill_lens=[len(PROMPT), 9])
    ).result
    assert list(result.statuses) == [OK, NO_PAGES]
    engine.close([1])
    result = engine.step(target_pb2.Step(prefill_ids=[2], prefill_lens=[9])).result
    assert list(result.statuses) == [OK] and result.num_tokens[0] == 1


def test_logits_that_are_not_finite_end_one_sequence_only(runner, monkeypatch):
    engine = new_engine(runner)
    truth = run(engine, opening(), plain)
    shard_logits = runner._model.shard_logits
    monkeypatch.setattr(
        runner._model, "shard_logits", lambda hidden: shard_logits(hidden).index_fill(0, torch.tensor([1]), torch.nan)
    )
    step = target_pb2.Step(open=[opening(1), opening(2)], prefill_ids=[1, 2], prefill_lens=[len(PROMPT)] * 2)
    result = engine.step(step).result
    assert list(result.statuses) == [OK, FAILED] and "finite" in result.errors[0]
    assert list(result.token_ids) == truth[:1]


def test_log_probabilities_are_of_the_raw_logits_and_best_first(runner, tiny_target):
    engine = new_engine(runner)
    message = opening(temperature=0.5, top_k=1, num_logprobs=3)
    result = engine.step(target_pb2.Step(open=[message], prefill_ids=[1], prefill_lens=[len(PROMPT)])).result
    with torch.inference_mode():
        expected = tiny_target.load_model()(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    best, ids = expected.topk(3)
    assert list(result.logprobs[0].top_token_ids) == ids.tolist()
    assert result.logprobs[0].top_logprobs == pytest.approx(best.tolist(), abs=1e-4)
    assert result.logprobs[0].chosen[0] == pytest.approx(best[0].item(), abs=1e-4)


@pytest.mark.parametrize("chunk", [2, 3, 50])
def test_a_prompts_own_log_probabilities_are_those_of_transformers_however_it_is_cut(runner, tiny_target, chunk):
    engine = new_engine(runner)
    neighbour = opening(2)
    step = target_pb2.Step(open=[opening(num_prompt_logprobs=2), neighbour], prefill_ids=[2], prefill_lens=[7])
    parts = []
    for _ in range(0, len(PROMPT), chunk):
        step.prefill_ids.append(1)
        step.prefill_lens.append(chunk)
        result = engine.step(step).result
        parts += result.prompt_logprobs
        step = target_pb2.Step()
    assert result.num_tokens[-1] == 1
    with torch.inference_mode():
        expected = tiny_target.load_model()(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    position = 1
    for part in parts:
        assert (part.sequence_id, part.start) == (1, position)
        for i, value in enumerate(part.logprobs.chosen):
            row = expected[position - 1]
            assert value == pytest.approx(float(row[PROMPT[position]]), abs=1e-4)
            best = row.topk(2)
            assert part.logprobs.top_token_ids[2 * i : 2 * i + 2] == best.indices.tolist()
            assert part.logprobs.top_logprobs[2 * i : 2 * i + 2] == pytest.approx(best.values.tolist(), abs=1e-4)
            position += 1
    assert position == len(PROMPT)


def test_a_resumed_sequences_prompt_is_not_scored_again(runner):
    engine = new_engine(runner)
    message = opening(tokens=[*PROMPT, 9], prompt_len=len(PROMPT), num_prompt_logprobs=0)
    result = engine.step(target_pb2.Step(open=[message], prefill_ids=[1], prefill_lens=[8])).result
    assert result.num_tokens[0] == 1 and not result.prompt_logprobs
