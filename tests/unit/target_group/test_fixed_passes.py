"""Passes of fixed numbers of rows: the tokens of plain decoding, by products of one shape, over memory that stays.

A CPU calls the very functions that a GPU captures as graphs, over the same buffers.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dflash_ray.kernels.graphs import Graphs
from dflash_ray.sampling.parameters import REJECTION
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.fixed_passes import FixedPasses
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.pass_buffers import PassBuffers
from dflash_ray.target_group.pass_memory import target_pass_bytes
from tests.steps import PROMPT, VOCAB, garbage, opening, oracle, plain, run, step_of, tokens_of, verify_step
from tests.trees import random_trees
from tests.unit.target_group.conftest import CONFIG
from tests.unit.target_group.test_engine import new_engine
from tests.unit.target_group.test_features import LAYERS, generate, runner_with_taps, wanting_features
from tests.unit.target_group.test_features import new_engine as engine_with_features
from tests.unit.target_group.test_trees import SAMPLINGS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def passes(
    target, shapes=(16,), is_exact=True, dtype="float32", device="cpu", projector=None, kv_tokens=2048, **options
):
    """A runner on a device, with all that is to be captured captured."""
    config = CONFIG.model_copy(
        update={
            "model": CONFIG.model.model_copy(update={"dtype": dtype}),
            "target": CONFIG.target.model_copy(update={"device": device, "kv_cache_tokens": kv_tokens}),
        }
    )
    layers = LAYERS if projector is not None else ()
    model = RankModel(target, config, 0, 1, projector, layers, runs_as_device=True)
    assert model.has_fixed_passes
    runner = FixedPasses(model, SingleRank(), device, shapes, is_exact, **options)
    runner.capture(has_trees=True)
    return runner


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.mark.parametrize("rows", [16, 64])
def test_the_memory_of_a_pass_is_what_was_counted_before_it_was_made(process_group, tiny_target, device, rows):
    runner = passes(tiny_target, shapes=(rows,), device=device)
    (buffers,), model = runner._buffers, runner._model
    made = (buffers._inputs, buffers.hidden, buffers._outputs)
    page_size, rank_vocab_size = model.cache.page_size, 1000
    counted = target_pass_bytes(model, (rows,), page_size, rank_vocab_size)
    sums = rows * model.heads * -(-model.max_model_len // 256) * (model.head_dim + 2) * 4
    assert counted == sum(one.nbytes for one in made) + rows * rank_vocab_size * model.dtype.itemsize + sums


@pytest.fixture(scope="module")
def fixed(process_group, tiny_target, device):
    return passes(tiny_target, device=device)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_are_those_of_layers_that_run_as_they_are(fixed, runner, sampling):
    truth = run(new_engine(runner), opening(**sampling), plain)
    engine = new_engine(fixed)
    assert run(engine, opening(**sampling), plain) == truth
    for draft_of in (garbage, oracle(truth, len(PROMPT), wrong_at=2), random_trees(truth, len(PROMPT), 3)):
        assert run(engine, opening(**sampling), draft_of) == truth


def test_what_a_pass_does_not_verify_is_verified_behind_it(fixed, runner):
    for sampling in ({"temperature": 1.0, "num_logprobs": 3}, {"temperature": 0.8, "mode": REJECTION}):
        wanted = run(new_engine(runner), opening(**sampling), garbage)
        assert run(new_engine(fixed), opening(**sampling), garbage) == wanted


def test_more_penalised_tokens_than_a_pass_has_room_for(fixed, runner):
    sampling = {"repetition_penalty": 1.2, "bias_ids": list(range(VOCAB)), "bias_values": [0.1] * VOCAB}
    start = opening(tokens=list(range(60)) * 3, max_new=20, **sampling)
    assert run(new_engine(fixed), start, garbage, chunk=70) == run(new_engine(runner), start, garbage, chunk=70)


def test_log_probabilities_of_prompts_and_tokens_are_as_they_were(fixed, runner):
    start = opening(num_logprobs=2, num_prompt_logprobs=1)
    got, wanted = (new_engine(one).step(step_of([start], {1: len(PROMPT)})) for one in (fixed, runner))
    assert got.token_ids.tolist() == wanted.token_ids.tolist()
    prompts = (got.prompt_logprobs[0].logprobs, wanted.prompt_logprobs[0].logprobs)
    for mine, theirs in ((got.logprobs[0], wanted.logprobs[0]), prompts):
        assert np.allclose(mine.chosen, theirs.chosen, atol=1e-4)
        assert mine.top_ids.tolist() == theirs.top_ids.tolist()


def prompt_of(number: int) -> list[int]:
    return random.Random(number).choices(range(VOCAB), k=9 + 5 * number % 23)


def texts(engine: Engine, numbers, draft_of, max_new: int, sampling) -> dict[int, list[int]]:
    """Sequences that join a batch one after the other, in chunks, and leave it when they are done."""
    waiting, known, left = list(numbers), {}, {}
    prompts: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    turn = 0
    while waiting or known or left:
        turn += 1
        opened = []
        if waiting and turn % 2:
            number = waiting.pop(0)
            prompts[number] = prompt_of(number)
            opened, left[number] = [opening(number, prompts[number], max_new=max_new, **sampling)], len(prompts[number])
        prefill = {number: min(1 + turn % 7, count) for number, count in left.items()}
        verify = {}
        for number, tokens in known.items():
            room = len(prompts[number]) + max_new - len(tokens) - 1
            verify[number] = (len(tokens), draft_of(number, tokens)[: max(0, room)])
        output = engine.step(step_of(opened, prefill, verify))
        assert not output.errors
        for number, count in prefill.items():
            left[number] -= count
        tokens_by_number = tokens_of(output)
        for number, finish in zip(output.sequence_ids.tolist(), output.finishes.tolist(), strict=True):
            if number in left and not left[number]:
                del left[number]
                known[number] = list(prompts[number])
            if number in known:
                known[number] += tokens_by_number[number]
            if finish:
                found[number] = known.pop(number)[len(prompts[number]) :]
                engine.close([number])
    return found


@pytest.fixture
def shape_bound(device, monkeypatch):
    """Products that depend on their number of rows, as those of a GPU's libraries do, on a CPU much more so."""
    if device == "cpu":
        product = F.linear
        monkeypatch.setattr(F, "linear", lambda x, *rest: product(x, *rest) * (1 + len(x) % 61 / 61))


def test_drafts_change_tokens_where_products_depend_on_the_rows_of_a_step(
    process_group, tiny_target, shape_bound, device
):
    if device == "cpu":  # on a GPU it is the library's affair whether they do
        engine = new_engine(passes(tiny_target, (16, 64), False, "bfloat16"))
        plain_texts, drafted = (
            texts(engine, range(1, 7), lambda *_, count=count: [4] * count, 20, {}) for count in (0, 5)
        )
        assert plain_texts != drafted


def test_drafts_change_no_token_in_bfloat16_whatever_else_is_in_a_batch(
    process_group, tiny_target, device, shape_bound
):
    count, max_new, shape, kv_tokens = (64, 216, 64, 1 << 15) if device == "cuda" else (6, 20, 16, 2048)
    runner = passes(tiny_target, (shape,), dtype="bfloat16", device=device, kv_tokens=kv_tokens)

    def engine():
        return new_engine(runner, kv_tokens // CONFIG.target.page_size)

    for sampling in ({}, {"temperature": 0.8, "top_p": 0.95}):
        alone = {}
        for number in range(1, count + 1):
            alone |= texts(engine(), [number], lambda *_: [], max_new, sampling)

        def drafts(number, tokens, alone=alone):
            at, length = len(tokens) - len(prompt_of(number)), (len(tokens) + number) % 6
            truth = alone[number][at : at + length]
            return truth if len(tokens) % 3 else [*truth[:-1], (truth[-1] + 1) % VOCAB] if truth else []

        assert texts(engine(), range(1, count + 1), drafts, max_new, sampling) == alone
        assert texts(engine(), range(count, 0, -1), lambda *_: [], max_new, sampling) == alone


def test_every_product_has_one_number_of_rows_where_passes_are_exact(process_group, tiny_target, monkeypatch):
    rows = []
    product = F.linear

    def linear(x, *rest):
        rows.append(len(x))
        return product(x, *rest)

    runner = passes(tiny_target, dtype="bfloat16", projector=torch.nn.Linear(96, 48, dtype=torch.bfloat16))
    monkeypatch.setattr(F, "linear", linear)
    engine = new_engine(runner)
    engine.step(step_of([opening(1), opening(2, [5] * 40), opening(3, num_logprobs=1)], {1: 7, 2: 40, 3: 7}))
    engine.step(step_of(prefill={}, verify={1: (8, [1, 2])}))
    assert len(rows) > 40 and set(rows) == {16}


def test_passes_that_need_not_be_exact_are_the_smallest_that_hold_a_step(process_group, tiny_target, monkeypatch):
    rows = []
    product = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: rows.append(len(x)) or product(x, *rest))
    engine = new_engine(passes(tiny_target, (16, 64), is_exact=False))
    for length, wanted in ((7, 16), (16, 16), (17, 64), (90, 90)):
        rows.clear()
        engine.step(step_of([opening(1, [3] * length)], {1: length}))
        assert set(rows) <= {wanted, 1} and wanted in rows, (length, set(rows))


@pytest.mark.parametrize("returns_features", [True, False])
def test_features_are_those_of_layers_that_run_as_they_are(process_group, tiny_target, device, returns_features):
    runner = passes(tiny_target, device=device, projector=torch.nn.Identity(), returns_features=returns_features)
    got, wanted = (
        generate(engine_with_features(one)[0], wanting_features()) for one in (runner, runner_with_taps(tiny_target))
    )
    assert got[0] == wanted[0]
    torch.testing.assert_close(got[1].cpu(), wanted[1], rtol=1e-4, atol=1e-4)


def test_features_of_some_sequences_over_several_passes(process_group, tiny_target):
    runner = passes(tiny_target, projector=torch.nn.Identity(), returns_features=True)
    outputs = []
    for one in (runner, runner_with_taps(tiny_target)):
        opened = [wanting_features(1), opening(2), wanting_features(3, [4] * 20)]
        outputs.append(engine_with_features(one)[0].step(step_of(opened, {1: 7, 2: 7, 3: 20})).features)
    got, wanted = outputs
    assert got.sequence_ids.tolist() == [1, 3] and got.num_rows.tolist() == [7, 20]
    torch.testing.assert_close(got.rows, wanted.rows, rtol=1e-4, atol=1e-4)


def test_features_that_left_are_not_written_again(process_group, tiny_target):
    engine, _ = engine_with_features(passes(tiny_target, projector=torch.nn.Identity(), returns_features=True))
    first = engine.step(step_of([wanting_features()], {1: 7})).features.rows
    kept = first.clone()
    engine.step(step_of([wanting_features(2, [9] * 12)], {2: 12}))
    assert torch.equal(first, kept)


def test_a_step_is_one_copy_to_the_device_and_one_back(process_group, tiny_target, monkeypatch):
    runner = passes(tiny_target, projector=torch.nn.Identity(), returns_features=True)
    engine, copies = engine_with_features(runner)[0], []
    output = engine.step(step_of([wanting_features()], {1: 7}))
    known = [*PROMPT, *output.token_ids.tolist()]
    for name in ("send", "fetch"):
        method = getattr(PassBuffers, name)
        monkeypatch.setattr(PassBuffers, name, lambda *args, n=name, m=method: copies.append(n) or m(*args))
    to, cpu = torch.Tensor.to, torch.Tensor.cpu

    def counted(tensor, *where, **options):
        if isinstance(where[0], str | torch.device):  # and no type
            copies.append("to")
        return to(tensor, *where, **options)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append("cpu") or cpu(tensor))
    engine.step(verify_step({1: known}, {1: [4, 5]}))
    assert copies == ["send", "fetch"]


@pytest.mark.gpu
def test_a_replay_is_the_pass_as_it_runs_to_the_bit(process_group, tiny_target):
    for sampling in SAMPLINGS:
        runner = passes(tiny_target, (16, 64), False, "bfloat16", "cuda")
        replayed = run(new_engine(runner), opening(**sampling), garbage)
        assert len(runner._graphs) == 2 * (2 + 3)
        runner._graphs = Graphs(torch.device("cuda"))
        assert run(new_engine(runner), opening(**sampling), garbage) == replayed
