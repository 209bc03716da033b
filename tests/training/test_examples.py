"""The recipe of the drafter that comes along is valid, and the conversations it names are whole."""

from pathlib import Path

import pytest

from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.config import load_training_config
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import read_jsonl

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "train_smollm2" / "recipe.yaml"
COUNTS = (5641, 1024, 3662, 4864, 2048, 2304, 13824)


@pytest.mark.parametrize(("number", "count"), enumerate(COUNTS, start=1))
def test_the_recipes_conversations_are_whole(number, count):
    config = load_training_config(RECIPE)
    conversations = [record for _, record in read_jsonl(ROOT / config.capture.conversations[number - 1], LeftOut())]
    assert len(conversations) == count
    vocab_size = resolve_target(config.target).config.vocab_size
    assert all(0 <= token < vocab_size for record in conversations for token in record["response_ids"])


def test_no_prompt_of_the_evaluation_is_among_them():
    config = load_training_config(RECIPE)
    evaluated = {record["prompt"] for _, record in read_jsonl(ROOT / config.evaluate.prompts, LeftOut())}
    for path in config.capture.conversations:
        assert not any(record.get("prompt") in evaluated for _, record in read_jsonl(ROOT / path, LeftOut()))


def test_the_drafter_that_comes_along_has_the_recipes_shape_and_carries_it():
    config = load_training_config(RECIPE)
    assert len(config.capture.conversations) == len(COUNTS)
    drafter = resolve_drafter("builtin:smollm2-135m-dflash", resolve_target(config.target))
    assert drafter.config.block_size == config.drafter.block_size
    assert drafter.config.target_layer_ids == config.drafter.tap_layer_ids
    assert drafter.config.windows == (config.drafter.sliding_window,) * len(config.drafter.init_layer_ids)
    assert drafter.draft_ids is not None and len(drafter.draft_ids) == config.drafter.draft_vocab_size
    carried = ROOT / "dflash_ray" / "assets" / "smollm2-135m-dflash" / "training.yaml"
    assert load_training_config(carried) == config
