"""Steps that are not finite are left out, checkpoints stay finite, and a run goes on with its own settings alone."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from dflash_ray.core.files import DiskFullError
from dflash_ray.models.drafter_checkpoint import save_drafter
from dflash_ray.training.checkpoints import About, RunError, load_checkpoint, save_checkpoint
from dflash_ray.training.config import TrainingConfig
from dflash_ray.training.fit import fit
from dflash_ray.training.shards import Answered, ShardStore, write_shard
from tests.training.conftest import last_error_of, poison, recipe, run_step, save_recipe, share

GOOD, BAD = {"max_steps": 3}, {"max_steps": 60, "learning_rate": 1e12, "warmup_steps": 1}


def begun(pipeline, target_dir, directory, **fit_keys) -> TrainingConfig:
    """A run of three good steps."""
    config = recipe(target_dir, directory, fit=GOOD | fit_keys)
    share(pipeline[0], config, "shards", "prompts")
    fit(config)
    return config


def hash_of(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_finite(path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def test_steps_that_are_not_finite_are_left_out_and_counted(pipeline, target_dir, tmp_path):
    config = recipe(target_dir, tmp_path, fit={"max_steps": 40})
    poison(ShardStore(pipeline[0].shards_dir), config, every=30)
    output = run_step("fit", save_recipe(config, tmp_path / "recipe.yaml"))
    state, about = load_checkpoint(config.fit_dir / "state.safetensors")
    assert int(state["step"]) == 40 and 0 < about.num_skipped < 40
    assert f"{about.num_skipped} steps left out, as their loss or gradient was not finite" in output
    assert is_finite(config.fit_dir / "state.safetensors") and is_finite(config.trained_dir / "model.safetensors")
    counts = {int(state[name]) for name in state if name.startswith("adamw.step")}
    assert counts == {40 - about.num_skipped}


def test_a_run_ends_after_so_many_bad_steps_and_says_that_the_taps_are_at_fault(pipeline, target_dir, tmp_path):
    config = recipe(target_dir, tmp_path, fit={"max_skipped_steps": 4})
    poison(ShardStore(pipeline[0].shards_dir), config, every=1)
    with pytest.raises(RunError, match=r"^fit: steps 1 to 4 were left out.*another work_dir.*after step 0 is kept$"):
        fit(config)
    assert not list(config.fit_dir.rglob("*.safetensors"))


def test_a_diverging_run_ends_with_what_to_change_and_keeps_the_last_good_state(pipeline, target_dir, tmp_path):
    config = begun(pipeline, target_dir, tmp_path)
    recipe_file = save_recipe(config, tmp_path / "recipe.yaml")
    drafter = hash_of(config.trained_dir / "model.safetensors")
    changed = ["fit.changed_keys=[fit.learning_rate, fit.warmup_steps]", *(f"fit.{k}={v}" for k, v in BAD.items())]
    text = last_error_of("fit", recipe_file, *changed)
    assert "Lower fit.learning_rate (1e+12) or fit.clip_norm (1), name the key in fit.changed_keys" in text
    state, about = load_checkpoint(config.fit_dir / "state.safetensors")
    assert f"after step {int(state['step'])} is kept" in text and about.num_skipped == 0
    assert 3 <= int(state["step"]) < 60 and is_finite(config.fit_dir / "state.safetensors")
    assert hash_of(config.trained_dir / "model.safetensors") == drafter


def test_weights_that_overflow_in_a_step_end_the_run_and_the_checkpoint_before_is_kept(pipeline, target_dir, tmp_path):
    config = begun(pipeline, target_dir, tmp_path)
    before = hash_of(config.fit_dir / "state.safetensors")
    keys = {"max_steps": 9, "learning_rate": 1e38, "changed_keys": ["fit.learning_rate"]}
    with pytest.raises(RunError, match="weights are too large to compute with after step 4"):
        fit(recipe(target_dir, tmp_path, fit=keys))
    assert hash_of(config.fit_dir / "state.safetensors") == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_checkpoint_is_never_replaced_by_one_that_is_not_finite(value, tmp_path):
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, {"step": torch.tensor(3), "model.fc": torch.ones(2)}, About({"seed": 0}))
    before = hash_of(path)
    with pytest.raises(RunError, match=r"is not written, as averaged\.fc is not finite"):
        save_checkpoint(path, {"model.fc": torch.ones(2), "averaged.fc": torch.tensor([1.0, value])}, About({}))
    assert hash_of(path) == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_drafter_that_was_there(tmp_path):
    save_drafter(tmp_path, {"of": "before"}, {"fc": torch.zeros(1 << 20)})
    before = {file.name: hash_of(file) for file in tmp_path.iterdir()}
    (tmp_path / "model.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(DiskFullError):
        save_drafter(tmp_path, {"of": "after"}, {"fc": torch.ones(1 << 20)})
    assert {file.name: hash_of(file) for file in tmp_path.iterdir()} == before


def test_a_checkpoint_that_was_cut_off_is_named(pipeline, target_dir, tmp_path):
    config = begun(pipeline, target_dir, tmp_path)
    file = config.fit_dir / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "state.safetensors: is not a checkpoint" in last_error_of(
        "fit", save_recipe(config, tmp_path / "recipe.yaml")
    )


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("fit.learning_rate=0.5", "fit.learning_rate (was 0.003, is 0.5)"),
        ("fit.loss=decay", "fit.loss (was dpace, is decay)"),
        ("fit.optimizer=muon", "fit.optimizer (was adamw, is muon)"),
        ("drafter.mask_token_id=3", "drafter.mask_token_id (was 2, is 3)"),
        ("seed=5", "seed (was 0, is 5)"),
        ("prompts.held_out_fraction=0.5", "prompts.held_out_fraction (was 0.2, is 0.5)"),
        ("fit.init_drafter={trained}", "fit.init_drafter (was None, is "),
    ],
)
def test_going_on_with_other_settings_is_refused_by_their_names(override, named, pipeline, target_dir, tmp_path):
    config = begun(pipeline, target_dir, tmp_path)
    before = {file: hash_of(file) for file in config.fit_dir.rglob("*.safetensors")}
    text = last_error_of(
        "fit", save_recipe(config, tmp_path / "r.yaml"), override.format(trained=pipeline[0].trained_dir)
    )
    assert f"was begun with other settings: {named}" in text and text.count("(was") == 1
    assert before == {file: hash_of(file) for file in before}


def test_other_shards_are_other_settings_wherever_they_lie(pipeline, target_dir, tmp_path):
    config = begun(pipeline, target_dir, tmp_path)
    moved, other = tmp_path / "moved", recipe(target_dir, tmp_path / "other")
    moved.symlink_to(pipeline[0].shards_dir.resolve())
    fit(recipe(target_dir, tmp_path, fit={"max_steps": 4, "shards": [str(moved)]}))
    store = ShardStore(pipeline[0].shards_dir)
    answered = [
        Answered(one.prompt, 0.0, one.prompt_len, one.token_ids.tolist(), store.taps(i, (0, 2)))
        for i, one in enumerate(store.conversations[:9])
    ]
    write_shard(other.shards_dir / "00000.parquet", store.layout, answered)
    text = last_error_of("fit", save_recipe(config, tmp_path / "r.yaml"), f"fit.shards=[{other.shards_dir}]")
    assert "was begun with other settings: shards (was" in text


def test_how_long_how_often_and_where_may_change(pipeline, target_dir, tmp_path):
    begun(pipeline, target_dir, tmp_path)
    keys = {"max_steps": 5, "checkpoint_every_s": 9.0, "held_out_every_steps": 2, "num_threads": 0}
    config = recipe(target_dir, tmp_path, fit=keys, export={"name": "another"})
    fit(config)
    assert int(load_file(config.fit_dir / "state.safetensors")["step"]) == 5


def test_a_key_that_is_named_may_change_and_the_model_card_says_so(pipeline, target_dir, tmp_path):
    config = begun(pipeline, target_dir, tmp_path)
    recipe_file = save_recipe(config, tmp_path / "recipe.yaml")
    changed = ["fit.changed_keys=[fit.learning_rate]", "fit.learning_rate=0.001", "fit.max_steps=5"]
    run_step("fit", recipe_file, *changed)
    run_step("fit", recipe_file, *changed[1:])  # it is the run's own value now
    run = json.loads((config.fit_dir / "run.json").read_text())
    assert run["changes"] == [{"step": 3, "key": "fit.learning_rate", "before": 0.003, "after": 0.001}]
    run_step("export", recipe_file)
    card = (config.export.output_dir / "README.md").read_text()
    assert "Up to step 3 fit.learning_rate was 0.003, then 0.001." in card


@pytest.mark.parametrize("key", ["learning_rate", "fit.learning_rat", "drafter.block_size", "fit.init_drafter"])
def test_what_cannot_change_under_way_is_no_changed_key(key, target_dir, tmp_path):
    recipe_file = save_recipe(recipe(target_dir, tmp_path), tmp_path / "recipe.yaml")
    assert f"{key} is no key of `fit`" in last_error_of("fit", recipe_file, f"fit.changed_keys=[{key}]")
