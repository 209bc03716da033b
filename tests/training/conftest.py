"""A tiny target with a tokenizer and a chat template, and a recipe that trains a drafter for it in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dflash_ray.cli import app
from dflash_ray.training.config import TrainingConfig
from dflash_ray.training.shards import Answered, ShardStore, write_shard
from tests.tiny import SHAPE, save_tiny_target

START, END, MASK = "<|start|>", "<|end|>", "<|mask|>"
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'-+*/=()[]_<>|%&\"#@$"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)
SOURCES = ("sums", "words")


def save_tokenizer(directory: Path) -> None:
    """One token a character."""
    specials = [START, END, MASK]
    pieces = [*specials, *CHARACTERS][: SHAPE["vocab_size"]]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {"chat_template": TEMPLATE, "eos_token": END}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory) -> Path:
    """Its next token follows from the last one more than a random model's would, so that a drafter can learn it."""
    directory = save_tiny_target("qwen3", tmp_path_factory.mktemp("target"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(6.0)
        model.lm_head.weight.mul_(3.0)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def write_prompt_file(path: Path, count: int, seed: int = 0) -> None:
    generator = random.Random(seed)
    with path.open("w") as stream:
        for i in range(count):
            prompt = "".join(generator.choices("abcdefgh 0123456789", k=generator.randint(8, 20)))
            stream.write(json.dumps({"prompt": prompt, "source": SOURCES[i % 2]}) + "\n")


def share(source: TrainingConfig, mine: TrainingConfig, *parts: str) -> None:
    """Gives a run that has not begun `parts` of another run's work_dir."""
    mine.work_dir.mkdir()
    for part in parts:
        (mine.work_dir / part).symlink_to(source.work_dir / part)


def poison(source: ShardStore, config: TrainingConfig, every: int) -> None:
    """Shards of the same conversations, in which every so many have taps that are not finite."""
    answered = [
        Answered(one.prompt, one.temperature, one.prompt_len, one.token_ids.tolist(), source.taps(i, (0, 2)).clone())
        for i, one in enumerate(source.conversations)
    ]
    for one in answered[::every]:
        assert one.taps is not None
        one.taps[3] = torch.inf
    write_shard(config.shards_dir / "00000.parquet", source.layout, answered)


def recipe(target_dir: Path, work_dir: Path, **sections: dict) -> TrainingConfig:
    """A run in `work_dir`; `sections` replace single keys of the recipe's sections."""
    work_dir.mkdir(parents=True, exist_ok=True)
    prompt_file = work_dir / "prompts.jsonl"
    if not prompt_file.exists():
        write_prompt_file(prompt_file, 100)
    values: dict = {
        "target": str(target_dir),
        "work_dir": str(work_dir / "run"),
        "engine": {
            "num_threads": 1, "max_model_len": 128, "kv_cache_tokens": 2048, "page_size": 8, "max_batch_tokens": 128,
        },
        "drafter": {
            "tap_layer_ids": [0, 2], "init_layer_ids": [1, 3], "block_size": 5, "mask_token_id": 2,
            "draft_vocab_size": 64,
        },
        "prompts": {"files": [str(prompt_file)], "held_out_fraction": 0.2},
        "regenerate": {"max_new_tokens": 40, "max_length": 96, "temperatures": [0.0], "shard_conversations": 4},
        "fit": {
            "num_threads": 1, "max_steps": 200, "warmup_steps": 10, "optimizer": "adamw", "learning_rate": 3e-3,
            "bf16": False, "anchors_per_conversation": 16, "ema_decay": 0.95, "held_out_every_steps": 50,
        },
        "evaluate": {"max_new_tokens": 32, "block_sizes": [4, 8], "prompts_per_category": 4, "resamples": 200},
        "export": {"output_dir": str(work_dir / "exported")},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values[name] | section if isinstance(section, dict) else section
    return TrainingConfig.model_validate(values)


def save_recipe(config: TrainingConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def run_step(step: str, recipe_file, *overrides: str) -> str:
    options = [option for override in overrides for option in ("--set", override)]
    result = CliRunner().invoke(app, ["train", step, "--config", str(recipe_file), *options])
    assert result.exit_code == 0, result.output
    return result.output


def last_error_of(step: str, recipe_file, *overrides: str) -> str:
    """The last line of a step that fails, after its progress bars."""
    options = [option for override in overrides for option in ("--set", override)]
    result = CliRunner().invoke(app, ["train", step, "--config", str(recipe_file), *options])
    last = result.output.splitlines()[-1]
    assert result.exit_code == 1 and last.startswith("error: ")
    return last


@pytest.fixture(scope="session")
def pipeline(target_dir, tmp_path_factory):
    """The recipe after all steps, uninterrupted, and the results of the drafter before and after training."""
    directory = tmp_path_factory.mktemp("pipeline")
    config = recipe(target_dir, directory)
    recipe_file = save_recipe(config, directory / "recipe.yaml")
    run_step("prompts", recipe_file)
    run_step("regenerate", recipe_file)
    run_step("fit", recipe_file, "fit.max_steps=0")
    run_step("evaluate", recipe_file)
    untrained = json.loads(config.results_file.read_text())["results"]
    run_step("fit", recipe_file)
    run_step("evaluate", recipe_file)
    trained = json.loads(config.results_file.read_text())["results"]
    run_step("export", recipe_file)
    return config, untrained, trained
