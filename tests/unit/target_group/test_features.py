"""Context features of a step leave in pieces, are kept in the pages of their keys, and come again when asked for."""

from __future__ import annotations

import gc
import weakref

import torch

from dflash_ray.models.context_features import FEATURE_PIECE_BYTES, rows_of
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.pb import common_pb2
from dflash_ray.sampling.shards import SingleShard
from dflash_ray.target_group.codec import encode_features
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import RankModel, StepHidden
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.step import Opening, StepOutput
from tests.steps import PROMPT, garbage, opening, oracle, run, step_of, tokens_of, verify_step
from tests.tiny import save_tiny_target
from tests.unit.target_group.conftest import CONFIG

LAYERS = (0, 2)
WIDTH = 2 * 48


def runner_with_taps(target, dtype: str = "float32", projector: torch.nn.Module | None = None) -> GroupRunner:
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"dtype": dtype})})
    rank = RankModel(target, config, 0, 1, projector or torch.nn.Identity(), LAYERS)
    return GroupRunner(rank, SingleShard())


def new_engine(
    runner, num_pages: int = CONFIG.target.num_pages, width: int = WIDTH, dtype: torch.dtype = torch.float32
) -> tuple[Engine, FeatureStore]:
    store = FeatureStore(num_pages * CONFIG.target.page_size, width, dtype)
    return Engine(runner, num_pages, CONFIG.target.page_size, 256, features=store), store


def wanting_features(*args, **kwargs) -> Opening:
    return opening(*args, **kwargs, wants_features=True)


def pieces_of(output: StepOutput) -> list[common_pb2.ContextFeatures]:
    return [] if output.features is None else list(encode_features(output.features))


def generate(engine: Engine, start: Opening, draft_of=garbage, num_steps: int = 12, chunk: int = 3):
    """Runs a sequence for some steps; returns its tokens, its pieces, and leaves it open."""
    tokens, pieces, at = start.token_ids.tolist(), [], start.sequence_id
    opened = [start]
    for _ in range(0, len(start.token_ids), chunk):
        output = engine.step(step_of(opened, {at: chunk}))
        pieces += pieces_of(output)
        opened = []
    tokens += output.token_ids.tolist()
    for _ in range(num_steps):
        output = engine.step(verify_step({at: tokens}, {at: draft_of(tokens)[:3]}))
        pieces += pieces_of(output)
        tokens += output.token_ids.tolist()
    return tokens, pieces


def replay(engine: Engine, sequence_id: int, start: int = 0) -> list[common_pb2.ContextFeatures]:
    pieces = []
    while (found := engine.replay(sequence_id, start)) is not None:
        (piece,) = encode_features(found)
        assert piece.start == start
        pieces.append(piece)
        start += piece.num_rows
    return pieces


def rows(pieces) -> torch.Tensor:
    return torch.cat([rows_of(piece) for piece in pieces])


def test_pieces_of_the_steps_and_of_a_replay_are_the_taps_of_the_whole_text(process_group, tiny_target):
    engine, _ = new_engine(runner_with_taps(tiny_target))
    truth = run(engine, opening(), garbage)
    tokens, pieces = generate(engine, wanting_features(), oracle(truth, len(PROMPT), wrong_at=2), num_steps=8)
    assert tokens[len(PROMPT) :] == truth[: len(tokens) - len(PROMPT)] and len(tokens) == len(PROMPT) + 1 + 8 * 3
    with torch.no_grad():
        hidden = tiny_target.load_model()(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[layer + 1][0] for layer in LAYERS], dim=-1)
    torch.testing.assert_close(rows(pieces), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows(replay(engine, 1)), rows(pieces))
    assert all(len(piece.token_ids) == piece.num_rows for piece in pieces)
    assert [token for piece in pieces for token in piece.token_ids] == tokens[:-1]
    assert torch.equal(rows(replay(engine, 1, start=9)), rows(pieces)[9:])


def test_features_of_a_bfloat16_target_travel_and_rest_in_bfloat16(process_group, tmp_path):
    target = resolve_target(str(save_tiny_target("llama", tmp_path)))
    engine, store = new_engine(runner_with_taps(target, "bfloat16"), dtype=torch.bfloat16)
    _, pieces = generate(engine, wanting_features())
    again = replay(engine, 1)
    assert {piece.dtype for piece in (*pieces, *again)} == {common_pb2.DATA_TYPE_BFLOAT16}
    assert torch.equal(rows(again), rows(pieces)) and rows(again).dtype is torch.bfloat16
    assert store.num_bytes == CONFIG.target.kv_cache_rows * WIDTH * 2


class Widened(torch.nn.Module):
    """Features of so many values that few rows fill a piece."""

    width = 30_000

    def forward(self, taps: torch.Tensor) -> torch.Tensor:
        return taps.repeat(1, self.width // WIDTH + 1)[:, : self.width].contiguous()


def test_every_message_with_features_is_bounded(process_group, tiny_target):
    engine, _ = new_engine(runner_with_taps(tiny_target, projector=Widened()), width=Widened.width)
    _, pieces = generate(engine, wanting_features(), chunk=7)
    again = replay(engine, 1)
    for found in (pieces, again):
        assert max(len(piece.data) for piece in found) <= FEATURE_PIECE_BYTES
    assert pieces[0].num_rows == again[0].num_rows == FEATURE_PIECE_BYTES // (4 * Widened.width)
    assert torch.equal(rows(again), rows(pieces))


def test_there_is_nothing_to_replay_of_sequences_that_are_unknown_or_want_no_features(process_group, tiny_target):
    engine, _ = new_engine(runner_with_taps(tiny_target))
    assert engine.replay(1, 0) is None
    _, pieces = generate(engine, opening(1))
    assert not pieces and engine.replay(1, 0) is None
    tokens, _ = generate(engine, wanting_features(2))
    assert engine.replay(2, len(tokens) - 2).num_rows.tolist() == [1]
    assert engine.replay(2, len(tokens) - 1) is None
    engine.close([2])
    assert engine.replay(2, 0) is None


def test_nothing_is_kept_where_nothing_replays(process_group, tiny_target):
    engine = Engine(runner_with_taps(tiny_target), 64, CONFIG.target.page_size, 256)
    _, pieces = generate(engine, wanting_features())
    assert pieces and engine.replay(1, 0) is None


class Watched:
    """A runner that knows which of the arrays behind its steps' features are still held by someone."""

    def __init__(self, runner: GroupRunner) -> None:
        self._runner, self.device = runner, runner.device
        self._arrays: list[weakref.ref] = []

    def forward(self, batch) -> StepHidden:
        hidden = self._runner.forward(batch)
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
    long_tokens, pieces = generate(engine, wanting_features(1, max_new=200), num_steps=0)
    size = store.num_bytes
    for short in range(2, 42):
        step = verify_step(
            {1: long_tokens},
            {1: []},
            open=[wanting_features(short)],
            prefill={short: len(PROMPT)},
            close=[short - 1] if short > 2 else [],
        )
        output = engine.step(step)
        pieces += [piece for piece in pieces_of(output) if piece.sequence_id == 1]
        long_tokens += tokens_of(output)[1]
    del output
    assert watched.num_alive() == 0
    assert store.num_bytes == size == CONFIG.target.kv_cache_rows * WIDTH * 4
    assert torch.equal(rows(replay(engine, 1)), rows(pieces)) and len(rows(pieces)) == len(long_tokens) - 1


def test_pages_that_are_handed_on_carry_the_features_of_their_new_sequence(process_group, tiny_target):
    engine, _ = new_engine(runner_with_taps(tiny_target), num_pages=6)
    for sequence_id, prompt in ((1, PROMPT), (2, PROMPT[::-1])):
        _, pieces = generate(engine, wanting_features(sequence_id, prompt, max_new=9), num_steps=3)
        assert torch.equal(rows(replay(engine, sequence_id)), rows(pieces))
        engine.close([sequence_id])
