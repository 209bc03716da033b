"""Rows that were found computed are those that would have been: the same tokens, drafts and features, sooner."""

from __future__ import annotations

import pytest
import torch

from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from tests.steps import PROMPT, garbage, opening, oracle, plain, run, step_of, tokens_of, verify_step
from tests.tiny import save_tiny_target
from tests.unit.target_group.conftest import CONFIG
from tests.unit.target_group.test_engine import NO_PAGES, OK, PENALISED, new_engine
from tests.unit.target_group.test_features import WIDTH, generate, read, runner_with_taps, wanting_features

PAGE = CONFIG.target.page_size
LONG = [(7 * i * i + 3 * i) % 90 for i in range(41)]
SAMPLINGS = [{}, {"temperature": 0.8}, PENALISED, {"temperature": 1.0, "top_p": 0.8, "min_p": 0.01}]


def caching_engine(runner, num_pages: int = CONFIG.target.num_pages, **options) -> Engine:
    return Engine(runner, num_pages, PAGE, 256, caches_prefixes=True, **options)


def prefill(engine: Engine, *openings, chunk: int = 100):
    return engine.step(step_of(openings, {one.sequence_id: chunk for one in openings}))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded", "penalties", "top-p"])
def test_a_second_turn_gets_the_same_tokens_whether_its_history_is_found_or_computed(runner, sampling):
    """Half of what is found was computed as drafts and anchors."""
    truth = run(new_engine(runner), opening(tokens=LONG, **sampling), plain)
    second = [*LONG, *truth, *PROMPT]
    for draft_of in (plain, garbage, oracle(truth, len(LONG), wrong_at=3)):
        expected = run(new_engine(runner), opening(2, second, **sampling), plain)
        engine = caching_engine(runner)
        assert run(engine, opening(tokens=LONG, **sampling), draft_of) == truth
        output = prefill(engine, opening(2, second, **sampling))
        assert output.num_tokens[0] == 1 and output.kv_lens[0] == len(second)
        assert output.cached_lens[0] == (len(LONG) + len(truth) - 1) // PAGE * PAGE
        engine.close([2])
        assert run(engine, opening(2, second, **sampling), draft_of) == expected


def test_found_rows_are_bit_for_bit_those_that_a_prefill_computes(process_group, tmp_path):
    """In a lean decoder, and in the layers of transformers under DeepSpeed, which cohere has."""
    for kind in ("llama", "qwen3", "cohere"):
        target = resolve_target(str(save_tiny_target(kind, tmp_path / kind)))
        model = RankModel(target, CONFIG, 0, 1)
        runner = GroupRunner(model, SingleRank())
        engine = caching_engine(runner)
        truth = run(new_engine(runner), opening(tokens=LONG), plain)
        run(engine, opening(tokens=LONG), oracle(truth, len(LONG), wrong_at=2))
        second = [*LONG, *truth, *PROMPT]

        def rows(engine: Engine, second=second, cache=model._cache) -> list[torch.Tensor]:
            output = prefill(engine, opening(2, second))
            pages = torch.from_numpy(engine._table.pages[engine._table.slot_of[2]])
            at = (pages[: output.kv_lens[0] // PAGE, None] * PAGE + torch.arange(PAGE)).reshape(-1)
            return [part[at].clone() for part in (*cache.keys, *cache.values)]

        found, computed = rows(engine), rows(new_engine(runner))
        assert engine.prefixes.num_found
        assert all(map(torch.equal, found, computed)), kind


def test_the_last_known_token_is_computed_even_when_its_page_is_there(runner):
    engine = caching_engine(runner)
    truth = run(engine, opening(tokens=LONG[:40]), plain)
    output = prefill(engine, opening(2, LONG[:40]))
    assert output.cached_lens.tolist() == [36] and output.token_ids.tolist() == truth[:1]


def test_a_preempted_sequence_finds_its_own_rows_again(runner):
    engine = caching_engine(runner)
    for sampling in SAMPLINGS:
        truth = run(new_engine(runner), opening(tokens=LONG, **sampling), plain)
        salt = repr(sampling).encode()[:64]
        tokens = [*LONG, *prefill(engine, opening(1, LONG, cache_salt=salt, **sampling)).token_ids.tolist()]
        for _ in range(4):
            tokens += engine.step(
                verify_step({1: tokens}, {1: truth[len(tokens) - len(LONG) :][:3]})
            ).token_ids.tolist()
        engine.close([1])
        again = opening(1, tokens, prompt_len=len(LONG), cache_salt=salt, **sampling)
        output = prefill(engine, again)
        assert output.cached_lens[0] == (len(tokens) - 1) // PAGE * PAGE > len(LONG)
        assert tokens[len(LONG) :] + output.token_ids.tolist() == truth[: len(tokens) + 1 - len(LONG)]
        engine.close([1])


def test_choices_of_one_prompt_compute_it_once_and_draw_as_they_do_alone(runner):
    choices = [opening(at, LONG, seed=at, temperature=1.0) for at in range(1, 6)]
    alone = {one.sequence_id: run(new_engine(runner), one, plain) for one in choices}
    engine = caching_engine(runner)
    before = engine.allocator.num_free
    known = {one.sequence_id: list(LONG) for one in choices}
    opened, rows, lens = choices, 0, []
    while waiting := [at for at, tokens in known.items() if len(tokens) == len(LONG)]:
        output = engine.step(step_of(opened, dict.fromkeys(waiting, 16)))
        assert set(output.statuses.tolist()) == {OK}
        for at, tokens in tokens_of(output).items():
            known[at] += tokens
        opened = []
        lens.append(dict(zip(waiting, output.kv_lens.tolist(), strict=True)))
        rows += sum(output.kv_lens) - sum(lens[-2][at] for at in waiting) if len(lens) > 1 else sum(output.kv_lens)
    assert lens[0] == {1: 16, 2: 0, 3: 0, 4: 0, 5: 0}, "who finds its next rows under way waits for them"
    assert lens[1] == {1: 32, 2: 16, 3: 16, 4: 16, 5: 16}
    shared = 40 // PAGE
    assert before - engine.allocator.num_free == shared + 5 * (-(-len(LONG) // PAGE) - shared)
    for _ in range(8):
        for at, tokens in tokens_of(
            engine.step(verify_step(known, {at: garbage(known[at])[:2] for at in known}))
        ).items():
            known[at] += tokens
    assert all(tokens[len(LONG) :] == alone[at][: len(tokens) - len(LONG)] for at, tokens in known.items())
    for at in known:  # in any order, while others still have the pages
        engine.close([at])
        engine.allocator.check_integrity()
    assert engine.allocator.num_free == before


def test_a_sequence_that_ends_leaves_shared_pages_to_the_others(runner):
    engine = caching_engine(runner, num_pages=26)
    truth = run(new_engine(runner), opening(tokens=LONG), plain)
    prefill(engine, opening(1, LONG))
    tokens = [*LONG, *prefill(engine, opening(2, LONG)).token_ids.tolist()]
    engine.close([1])
    prefill(engine, opening(3, [95 - token for token in LONG]))  # takes what is free
    for _ in range(9):
        tokens += engine.step(verify_step({2: tokens}, {2: garbage(tokens)[:2]})).token_ids.tolist()
    assert tokens[len(LONG) :] == truth[: len(tokens) - len(LONG)]


def test_cached_pages_give_way_to_sequences_the_oldest_and_their_ends_first(runner):
    engine = caching_engine(runner, num_pages=24)
    prompts = {at: [(at * 17 + token) % 96 for token in LONG] for at in (1, 2, 3)}
    truth = {at: run(new_engine(runner), opening(at, tokens, max_new=4), plain) for at, tokens in prompts.items()}
    for at, tokens in prompts.items():  # 11 pages each: the third takes the other two's
        assert run(engine, opening(at, tokens, max_new=4), plain) == truth[at]
    assert engine.allocator.num_free == 24 and engine.allocator.num_kept > 20
    found = {at: int(prefill(engine, opening(at, prompts[at])).cached_lens[0]) for at in (3, 2)}
    assert found == {3: 40, 2: 40}
    output = prefill(engine, opening(1, prompts[1]))
    assert output.statuses.tolist() == [NO_PAGES]
    engine.close([2])
    output = prefill(engine, opening(1, prompts[1]))
    assert output.statuses.tolist() == [OK] and output.token_ids.tolist() == truth[1][:1]


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ({}, {}, True),
        ({"cache_salt": b"a"}, {"cache_salt": b"a"}, True),
        ({"cache_salt": b"a"}, {"cache_salt": b"b"}, False),
        ({}, {"cache_salt": b"a"}, False),
        ({"cache_salt": b"a"}, {}, False),
        ({"temperature": 1.0, "seed": 5}, {"frequency_penalty": 1.0}, True),
        ({"wants_features": True}, {}, True),
        ({}, {"wants_features": True}, False),
        ({}, {"num_prompt_logprobs": 0}, False),
        ({"num_prompt_logprobs": 0}, {}, True),
    ],
)
def test_rows_are_found_by_those_who_may_have_them(runner, first, second, found):
    engine = caching_engine(runner)
    prefill(engine, opening(1, LONG, **first))
    assert prefill(engine, opening(2, LONG, **second)).cached_lens.tolist() == [40 if found else 0]
    assert engine.prefixes.num_found == (40 if found else 0)


def test_rows_with_features_take_the_place_of_those_without(process_group, tiny_target):
    engine = caching_engine(runner_with_taps(tiny_target))
    for at, wants_features, found in ((1, False, 0), (2, True, 0), (3, True, 40), (4, False, 40)):
        assert prefill(engine, opening(at, LONG, wants_features=wants_features)).cached_lens.tolist() == [found]
    engine.close([1, 2, 3, 4])
    engine.allocator.check_integrity()


def test_a_beginning_that_parts_inside_a_page_is_found_up_to_that_page(runner):
    engine = caching_engine(runner)
    prefill(engine, opening(1, LONG))
    other = [*LONG[:22], (LONG[22] + 1) % 96, *LONG[23:]]
    output = prefill(engine, opening(2, other))
    assert output.cached_lens.tolist() == [20]
    assert output.token_ids.tolist() == prefill(new_engine(runner), opening(2, other)).token_ids.tolist()


def test_rows_of_logits_that_are_not_finite_are_not_found(runner, monkeypatch):
    engine = caching_engine(runner)
    rank_logits = runner._model.rank_logits
    monkeypatch.setattr(runner._model, "rank_logits", lambda hidden: rank_logits(hidden) * torch.nan)
    prefill(engine, opening(1, LONG))
    monkeypatch.undo()
    assert prefill(engine, opening(2, LONG)).cached_lens.tolist() == [0]


def test_features_of_found_rows_are_read_bit_for_bit_as_those_of_computed_ones(process_group, tiny_target):
    def store() -> FeatureStore:
        return FeatureStore(CONFIG.target.kv_cache_rows, WIDTH, torch.float32)

    runner = runner_with_taps(tiny_target)
    engine = caching_engine(runner, features=store())
    tokens, _ = generate(engine, wanting_features(1, LONG), num_steps=6, chunk=8)
    engine.close([1])
    second = [*tokens, *PROMPT]
    generate(engine, wanting_features(2, second), num_steps=3, chunk=100)
    count = int(engine._table.kv_lens[engine._table.slot_of[2]])
    assert engine.prefixes.num_found > len(LONG)
    found = read(engine, 2, count)
    fresh = Engine(runner, CONFIG.target.num_pages, PAGE, 256, features=store())
    generate(fresh, wanting_features(2, second), num_steps=3, chunk=100)
    assert torch.equal(found, read(fresh, 2, count))
