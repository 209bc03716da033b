"""Mistakes end in one line that names the key, the line or the file at fault."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from dflash_ray.cli import app
from dflash_ray.core.files import DiskFullError
from dflash_ray.training.config import CaptureSection
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import Prompt
from dflash_ray.training.regenerate import Task, capture, fill_shards
from dflash_ray.training.shards import Answered, ShardStore, TapLayout, write_shard
from tests.tiny import SHAPE
from tests.training.conftest import last_error_of, recipe, run_step, save_recipe, share

LAYOUT = TapLayout("target", (0, 2), 4)
ANSWERED = Answered(
    Prompt([{"role": "user", "content": "hi"}], "test"), 0.0, 2, [3, 4, 5], torch.randn(2, 8).to(torch.bfloat16)
)


def error_of(step: str, recipe_file, *overrides: str) -> str:
    options = [option for override in overrides for option in ("--set", override)]
    result = CliRunner().invoke(app, ["train", step, "--config", str(recipe_file), *options])
    assert result.exit_code == 1
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
    return result.output


@pytest.fixture
def recipe_file(target_dir, tmp_path):
    return save_recipe(recipe(target_dir, tmp_path), tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("step", "override", "named"),
    [
        ("fit", "fit.learning_rat=1", "fit.learning_rat"),
        ("fit", "fit.learning_rate=fast", "fit.learning_rate"),
        ("fit", "drafter.layer_types=[sliding_attention, full_attention]", "sliding_window"),
        ("prompts", "prompts.files=[]", "prompts: give at least one of"),
        ("prompts", "prompts.files=[nowhere.jsonl]", "nowhere.jsonl"),
        ("prompts", "prompts.traffic={directory: x, retention_days: 1}", "redact_patterns or redact_hook"),
        ("regenerate", "seed=1", "run `dflash-ray train prompts` first"),
        ("regenerate", "target=nowhere", "run `dflash-ray train prompts` first"),
        ("regenerate", "drafter.tap_layer_ids=[0, -1]", "drafter.tap_layer_ids"),
        ("capture", "seed=1", "capture.conversations"),
        ("fit", "seed=1", "there are no shards"),
        ("evaluate", "evaluate.drafter=nowhere", "drafter nowhere"),
        ("export", "seed=1", "config.json is missing"),
    ],
)
def test_a_step_without_what_it_needs_says_so(step, override, named, recipe_file):
    assert named in error_of(step, recipe_file, override)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("tap_layer_ids=[0, 9]", "drafter.tap_layer_ids: 9 is none of the target's layers, 0 to 3"),
        ("init_layer_ids=[0, 9]", "drafter.init_layer_ids: 9 is none of the target's layers, 0 to 3"),
        (f"mask_token_id={SHAPE['vocab_size']}", f"drafter.mask_token_id: {SHAPE['vocab_size']} is none of"),
    ],
)
@pytest.mark.parametrize("step", ["regenerate", "fit"])
def test_layers_and_tokens_that_the_target_lacks_are_named(step, override, named, pipeline, target_dir, tmp_path):
    config, _, _ = pipeline
    mine = recipe(target_dir, tmp_path)
    share(config, mine, "shards", "prompts")
    assert named in error_of(step, save_recipe(mine, tmp_path / "recipe.yaml"), f"drafter.{override}")


GOOD = {"prompt": "hi", "response_ids": [9, 10, 11], "source": "x", "temperature": 0}
SYSTEM_FIRST = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]


def write_rows(directory, *rows: dict):
    file = directory / "conversations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"response_ids": ["a"]}, "without response_ids"),
        ({"response_ids": []}, "without response_ids"),
        ({"response_ids": None}, "without response_ids"),
        ({"response_ids": [True]}, "without response_ids"),
        ({"response_ids": [SHAPE["vocab_size"]]}, "without response_ids"),
        ({"temperature": "hot"}, "whose temperature is no number from 0 on"),
        ({"temperature": float("nan")}, "whose temperature is no number from 0 on"),
        ({"temperature": -1}, "whose temperature is no number from 0 on"),
        ({"prompt": None}, "without `prompt`"),
        ({"prompt": "a" * 200}, "too long for answers within 96 tokens (regenerate.max_length)"),
        ({"prompt": "hi@"}, "given up by the target: the target's logits are not finite"),
        (
            {"messages": SYSTEM_FIRST},
            "without tokens: messages: the chat template refuses these messages: no system turns here",
        ),
    ],
)
def test_a_conversation_that_cannot_be_captured_is_left_out_and_named(row, reason, target_dir, tmp_path):
    config = recipe(refusing_target(target_dir, tmp_path), tmp_path)
    file = write_rows(tmp_path, GOOD, GOOD | row, GOOD | {"prompt": "ho"})
    config = config.model_copy(update={"capture": CaptureSection(conversations=(file,))})
    left_out = LeftOut()
    capture(config, left_out)
    ((place, found),) = left_out.rows
    assert place == f"{file}, line 2" and found.startswith(reason)
    assert [one.prompt.text for one in ShardStore(config.shards_dir).conversations] == ["hi", "ho"]
    again = LeftOut()
    capture(config, again)  # all shards are there already
    assert again.rows == left_out.rows


def refusing_target(target_dir, directory):
    """A target whose chat template takes no system turns, as Gemma's, and that overflows where a text has an @."""
    mine = directory / "refusing"
    shutil.copytree(target_dir, mine)
    weights = load_file(mine / "model.safetensors")
    weights["model.embed_tokens.weight"][Tokenizer.from_file(str(mine / "tokenizer.json")).token_to_id("@")] = torch.inf
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    values = json.loads((mine / "tokenizer_config.json").read_text())
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    values["chat_template"] = refusal + values["chat_template"]
    (mine / "tokenizer_config.json").write_text(json.dumps(values))
    return mine


def test_prompts_that_the_template_refuses_are_left_out_of_answers_and_evaluations(pipeline, target_dir, tmp_path):
    config = recipe(refusing_target(target_dir, tmp_path), tmp_path)
    rows = [{"prompt": "hi"}, {"messages": SYSTEM_FIRST}, {"prompt": "ho"}, {"prompt": "hum"}, {"prompt": "hi@"}]
    file = write_rows(tmp_path, *rows)
    recipe_file = save_recipe(config, tmp_path / "recipe.yaml")
    run_step("prompts", recipe_file, f"prompts.files=[{file}]")
    output = run_step("regenerate", recipe_file)
    refused = "1 without tokens: messages: the chat template refuses these messages: no system turns here"
    given_up = "1 given up by the target: the target's logits are not finite"
    assert "\nleft out 2 rows: " in output
    assert all(f"{reason} ({config.prompts_dir}" in output for reason in (refused, given_up))
    assert len(ShardStore(config.shards_dir).conversations) == 3
    keys = [f"evaluate.drafter={pipeline[0].trained_dir}", f"evaluate.prompts={file}", "evaluate.temperatures=[0.0]"]
    keys.append("evaluate.block_sizes=[4]")
    output = run_step("evaluate", recipe_file, *keys)
    assert f"\nleft out 2 rows: {refused} ({file}, line 2), {given_up} ({file}, line 5)\n" in output
    (result,) = (one for one in json.loads(config.results_file.read_text())["results"] if one["category"] == "all")
    assert result["num_prompts"] == 3


def test_shards_of_which_nothing_is_left_end_the_step_and_are_not_kept(target_dir, tmp_path):
    config = recipe(refusing_target(target_dir, tmp_path), tmp_path)
    recipe_file = save_recipe(config, tmp_path / "recipe.yaml")
    file = write_rows(tmp_path, GOOD | {"messages": SYSTEM_FIRST})
    text = last_error_of("capture", recipe_file, f"capture.conversations=[{file}]")
    assert "nothing is left; left out 1 row: 1 without tokens: messages: the chat template refuses" in text
    assert not list(config.shards_dir.iterdir())
    write_rows(tmp_path, {"prompt": "hi"})
    text = error_of("capture", recipe_file, f"capture.conversations=[{file}]")
    assert text.startswith("error: capture.conversations: nothing is left; left out 1 row: 1 without response_ids")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["evaluate.answers=nowhere"], "nowhere: there are no shards"),
        (["evaluate.answers={shards}", "drafter.tap_layer_ids=[0, 3]"], "lacks layers [3], which the drafter taps"),
    ],
)
def test_answers_that_cannot_be_followed_are_named_before_the_first_step(keys, named, pipeline, target_dir, tmp_path):
    config = recipe(target_dir, tmp_path)
    share(pipeline[0], config, "shards")
    keys = [key.format(shards=config.shards_dir) for key in keys]
    text = last_error_of("fit", save_recipe(config, tmp_path / "r.yaml"), "evaluate.temperatures=[0.0]", *keys)
    assert named in text and not config.fit_dir.exists()


def test_a_full_disk_stops_with_whole_shards_only(tmp_path):
    path = tmp_path / "00001.parquet"
    path.with_name(path.name + ".partial").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"no space left for .*00001\.parquet; .* run the step again"):
        write_shard(path, LAYOUT, [ANSWERED])
    assert not list(tmp_path.iterdir())


def test_shards_are_not_mixed_with_those_of_other_prompts_or_settings(target_dir, tmp_path):
    config = recipe(target_dir, tmp_path)
    fill_shards(config, [Task(ANSWERED.prompt, 0.0)], LeftOut())
    with pytest.raises(ValueError, match="begun with other prompts_and_settings; use another work_dir"):
        fill_shards(config, [Task(ANSWERED.prompt, 0.7)], LeftOut())


def test_a_truncated_shard_is_named(tmp_path):
    write_shard(tmp_path / "00000.parquet", LAYOUT, [ANSWERED])
    (tmp_path / "00000.parquet").write_bytes((tmp_path / "00000.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"00000\.parquet: is not a whole shard"):
        ShardStore(tmp_path)


def test_a_shard_that_is_damaged_inside_is_named(tmp_path):
    write_shard(tmp_path / "00000.parquet", LAYOUT, [ANSWERED])
    data = bytearray((tmp_path / "00000.parquet").read_bytes())
    data[4:120] = bytes(116)
    (tmp_path / "00000.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"00000\.parquet: is not a whole shard"):
        ShardStore(tmp_path)


def test_shards_of_different_targets_are_not_mixed(tmp_path):
    write_shard(tmp_path / "00000.parquet", LAYOUT, [ANSWERED])
    write_shard(tmp_path / "00001.parquet", replace(LAYOUT, target="other"), [ANSWERED])
    with pytest.raises(ValueError, match="differ in target or layers"):
        ShardStore(tmp_path)


def test_taps_come_back_as_they_were_stored(tmp_path):
    write_shard(tmp_path / "00000.parquet", LAYOUT, [ANSWERED, ANSWERED])
    store = ShardStore(tmp_path)
    assert torch.equal(store.taps(1, (0, 2)), ANSWERED.taps)
    assert torch.equal(store.taps(1, (2,)), ANSWERED.taps[:, 4:])
    assert store.conversations[1].token_ids.tolist() == ANSWERED.token_ids
