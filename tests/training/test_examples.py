"""The recipes of the drafter that comes along are valid, and the conversations they name are whole."""

from itertools import pairwise
from pathlib import Path

import pytest

from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.config import load_training_config
from dflash_ray.training.prompt_files import read_jsonl

DIRECTORY = Path(__file__).parents[2] / "examples" / "train_smollm2"


@pytest.mark.parametrize(
    ("name", "count"),
    [("first", 5641), ("second", 1024), ("third", 3662), ("fifth", 4864), ("seventh", 2048), ("ninth", 2304)],
)
def test_each_recipe_has_its_conversations(name, count):
    config = load_training_config(DIRECTORY / f"{name}.yaml")
    conversations = [record for _, record in read_jsonl(DIRECTORY / f"{name}.jsonl.gz")]
    assert config.capture.conversations == Path(f"examples/train_smollm2/{name}.jsonl.gz")
    assert len(conversations) == count
    vocab_size = resolve_target(config.target).config.vocab_size
    assert all(0 <= token < vocab_size for record in conversations for token in record["response_ids"])


def test_each_recipe_goes_on_from_what_the_one_before_leaves():
    names = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    recipes = [load_training_config(DIRECTORY / f"{name}.yaml") for name in names]
    for before, after in pairwise(recipes):
        assert after.fit.init_drafter == before.trained_dir
    first, *later = recipes
    assert first.fit.shards == ()  # its own
    shards = (first.shards_dir,)
    for recipe in later:
        if recipe.capture.conversations is not None:
            shards = (recipe.shards_dir, *shards)
        assert recipe.fit.shards == shards
