"""Context features of a step are kept in the pages of their keys and can be read again."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import torch

from dflash_ray.models.context_features import PackedRows, decode_response
from dflash_ray.models.feature_pages import FeaturePages, NamedRows, encode_named
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import RankModel, StepHidden
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.step import Opening, StepInput, StepOutput
from tests.steps import PROMPT, garbage, opening, oracle, run, step_of, tokens_of, verify_step
from tests.tiny import save_tiny_target
from tests.unit.target_group.conftest import CONFIG

LAYERS = (0, 2)
WIDTH = 2 * 48


def runner_with_taps(target, dtype: str = "float32", projector: torch.nn.Module | None = None) -> GroupRunner:
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"dtype": dtype})})
    rank = RankModel(target, config, 0, 1, projector or torch.nn.Identity(), LAYERS)
    return GroupRunner(rank, SingleRank())


def new_engine(
    runner, num_pages: int = CONFIG.target.num_pages, width: int = WIDTH, dtype: torch.dtype = torch.float32
) -> tuple[Engine, FeatureStore]:
    store = FeatureStore(num_pages * CONFIG.target.page_size, width, dtype)
    return Engine(runner, num_pages, CONFIG.target.page_size, 256, features=store), store


def sharing_engine(runner, num_pages: int = CONFIG.target.num_pages) -> tuple[Engine, FeaturePages]:
    """An engine whose features lie in shared memory, and that as a drafter has it."""
    shared = FeaturePages.create(num_pages, CONFIG.target.page_size, WIDTH, torch.float32)
    assert shared is not None
    store = FeatureStore(num_pages * CONFIG.target.page_size, WIDTH, torch.float32, shared=shared)
    engine = Engine(runner, num_pages, CONFIG.target.page_size, 256, features=store)
    return engine, FeaturePages.open(shared.offer, WIDTH)


def wanting_features(*args, **kwargs) -> Opening:
    return opening(*args, **kwargs, wants_features=True)


def kept(engine: Engine, step: StepInput) -> StepOutput:
    """Runs a step and stores its features."""
    output = engine.step(step)
    if output.features is not None:
        engine.keep_features(output.features)
    return output


def generate(engine: Engine, start: Opening, draft_of=garbage, num_steps: int = 12, chunk: int = 3):
    """Runs a sequence for some steps; returns its tokens, the rows of its steps, and leaves it open."""
    tokens, parts, at = start.token_ids.tolist(), [], start.sequence_id
    output = kept(engine, step_of([start], {at: chunk}))
    parts.append(rows_of(output, at))
    while not output.num_tokens[0]:
        output = kept(engine, step_of(prefill={at: chunk}))
        parts.append(rows_of(output, at))
    tokens += output.token_ids.tolist()
    for _ in range(num_steps):
        output = kept(engine, verify_step({at: tokens}, {at: draft_of(tokens)[:3]}))
        parts.append(rows_of(output, at))
        tokens += output.token_ids.tolist()
    return tokens, torch.cat(parts)


def rows_of(output: StepOutput, sequence_id: int) -> torch.Tensor:
    """Rows of one sequence that a step kept."""
    kept = output.features
    if kept is None or sequence_id not in kept.sequence_ids:
        return torch.empty(0, WIDTH)
    at = list(kept.sequence_ids).index(sequence_id)
    return kept.rows[kept.first_rows[at] : kept.first_rows[at] + kept.num_rows[at]]


def columns(sequence_ids: list[int], starts: list[int], counts: list[int]) -> tuple[np.ndarray, ...]:
    return np.array(sequence_ids, np.uint64), np.array(starts), np.array(counts)


def tensor(rows: PackedRows) -> torch.Tensor:
    return rows.tensor().view(-1, WIDTH)


def read(engine: Engine, sequence_id: int, count: int, start: int = 0) -> torch.Tensor:
    return tensor(engine.read_features(*columns([sequence_id], [start], [count])))


def test_rows_of_the_steps_and_those_read_later_are_the_taps_of_the_whole_text(process_group, tiny_target):
    engine, _ = new_engine(runner_with_taps(tiny_target))
    truth = run(engine, opening(), garbage)
    tokens, rows = generate(engine, wanting_features(), oracle(truth, len(PROMPT), wrong_at=2), num_steps=8)
    assert tokens[len(PROMPT) :] == truth[: len(tokens) - len(PROMPT)] and len(tokens) == len(PROMPT) + 1 + 8 * 3
    with torch.no_grad():
        hidden = tiny_target.load_model()(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[layer + 1][0] for layer in LAYERS], dim=-1)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(read(engine, 1, len(rows)), rows)
    assert torch.equal(read(engine, 1, len(rows) - 9, start=9), rows[9:])


def test_rows_of_several_sequences_are_read_together(process_group, tiny_target):
    engine, _ = new_engine(runner_with_taps(tiny_target))
    _, first = generate(engine, wanting_features(1))
    _, second = generate(engine, wanting_features(2, PROMPT[::-1]))
    rows = tensor(engine.read_features(*columns([2, 1], [3, 5], [4, 6])))
    assert torch.equal(rows, torch.cat([second[3:7], first[5:11]]))


def named(engine: Engine, drafter: FeaturePages, *wanted: list[int]) -> NamedRows:
    """Rows of (sequence ids, starts, counts) as a drafter learns of them."""
    message = encode_named(*wanted, *engine.name_features(*columns(*wanted)))
    return drafter.named(decode_response(message)[0].named)


def copied(rows: NamedRows) -> torch.Tensor:
    index = np.arange(len(rows.places))
    out = np.empty((len(index), 4 * WIDTH), dtype=np.uint8)
    rows.copy_to(out, index)
    assert not rows.is_gone(index).any()
    return torch.from_numpy(out).view(torch.float32)


def test_rows_in_shared_memory_are_found_where_they_are_named(process_group, tiny_target):
    engine, drafter = sharing_engine(runner_with_taps(tiny_target))
    _, first = generate(engine, wanting_features(1))
    early = named(engine, drafter, [1], [0], [len(first)])
    _, second = generate(engine, wanting_features(2, PROMPT[::-1]))
    both = named(engine, drafter, [2, 1], [3, 0], [len(second) - 3, len(first)])
    assert torch.equal(copied(both), torch.cat([second[3:], first]))
    assert torch.equal(copied(early), first), "another sequence's rows do not make them void"


def test_rows_of_a_sequence_that_is_over_are_gone_once_another_one_has_its_pages(process_group, tiny_target):
    engine, drafter = sharing_engine(runner_with_taps(tiny_target), num_pages=16)
    _, rows = generate(engine, wanting_features(1))
    early = named(engine, drafter, [1], [0], [len(rows)])
    engine.close([1])
    assert torch.equal(copied(early), rows), "nobody has written to its pages yet"
    generate(engine, wanting_features(2, PROMPT[::-1]))
    assert early.is_gone(np.arange(len(rows))).any()


def test_features_of_a_bfloat16_target_rest_in_bfloat16(process_group, tmp_path):
    target = resolve_target(str(save_tiny_target("llama", tmp_path)))
    engine, store = new_engine(runner_with_taps(target, "bfloat16"), dtype=torch.bfloat16)
    _, rows = generate(engine, wanting_features())
    again = read(engine, 1, len(rows))
    assert torch.equal(again, rows) and again.dtype is torch.bfloat16
    assert store.num_bytes == CONFIG.target.kv_cache_rows * WIDTH * 2


def test_sequences_that_want_no_features_have_none_in_a_steps_output(process_group, tiny_target):
    engine, _ = new_engine(runner_with_taps(tiny_target))
    _, rows = generate(engine, opening(1))
    assert not len(rows)


def test_reading_rows_of_a_sequence_that_is_gone_gives_rows_and_no_fault(process_group, tiny_target):
    engine, _ = new_engine(runner_with_taps(tiny_target))
    generate(engine, wanting_features(1))
    engine.close([1])
    assert read(engine, 1, 5).shape == (5, WIDTH)


class Watched:
    """A runner that knows which of the arrays behind its steps' features are still held by someone."""

    def __init__(self, runner: GroupRunner) -> None:
        self._runner, self.device = runner, runner.device
        self._arrays: list[weakref.ref] = []

    def forward(self, batch, columns) -> StepHidden:
        hidden = self._runner.forward(batch, columns)
        if hidden.features is None:
            return hidden
        array = hidden.features.numpy().copy()
        self._arrays.append(weakref.ref(array))
        return StepHidden(hidden.sampled, torch.from_numpy(array))

    def verify(self, hidden, columns):
        return self._runner.verify(hidden, columns)

    def score(self, hidden, batch):
        return self._runner.score(hidden, batch)

    def num_alive(self) -> int:
        gc.collect()
        return sum(array() is not None for array in self._arrays)


def test_many_short_sequences_beside_a_long_one_leave_no_memory_behind(process_group, tiny_target):
    watched = Watched(runner_with_taps(tiny_target))
    engine, store = new_engine(watched)
    long_tokens, rows = generate(engine, wanting_features(1, max_new=200), num_steps=0)
    parts = [rows.clone()]
    del rows
    size = store.num_bytes
    for short in range(2, 42):
        step = verify_step(
            {1: long_tokens},
            {1: []},
            open=[wanting_features(short)],
            prefill={short: len(PROMPT)},
            close=[short - 1] if short > 2 else [],
        )
        output = kept(engine, step)
        parts.append(rows_of(output, 1).clone())
        long_tokens += tokens_of(output)[1]
    del output
    assert watched.num_alive() == 0
    assert store.num_bytes == size == CONFIG.target.kv_cache_rows * WIDTH * 4
    rows = torch.cat(parts)
    assert torch.equal(read(engine, 1, len(rows)), rows) and len(rows) == len(long_tokens) - 1


def test_pages_that_are_handed_on_carry_the_features_of_their_new_sequence(process_group, tiny_target):
    engine, _ = new_engine(runner_with_taps(tiny_target), num_pages=6)
    for sequence_id, prompt in ((1, PROMPT), (2, PROMPT[::-1])):
        _, rows = generate(engine, wanting_features(sequence_id, prompt, max_new=9), num_steps=3)
        assert torch.equal(read(engine, sequence_id, len(rows)), rows)
        engine.close([sequence_id])
