"""Regenerating and fitting over Ray workers give what one process gives."""

import json

import pytest
import ray
from safetensors.torch import load_file

from dflash_ray.training.checkpoints import RunError, load_checkpoint
from dflash_ray.training.fit import fit
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.regenerate import regenerate
from dflash_ray.training.shards import ShardStore
from tests.training.conftest import poison, recipe, share

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


def test_shards_of_ray_data_actors_are_those_of_one_process(pipeline, target_dir, tmp_path):
    whole, _, _ = pipeline
    config = recipe(target_dir, tmp_path, regenerate={"num_workers": 2, "cpus_per_worker": 0.5})
    share(whole, config, "prompts")
    regenerate(config, LeftOut())
    ours, theirs = ShardStore(config.shards_dir), ShardStore(whole.shards_dir)
    assert [path.read_bytes() for path in ours.paths.values()] == [path.read_bytes() for path in theirs.paths.values()]


def test_a_full_disk_on_a_worker_is_said_in_its_own_words(pipeline, target_dir, tmp_path):
    whole, _, _ = pipeline
    config = recipe(target_dir, tmp_path, regenerate={"num_workers": 2, "cpus_per_worker": 0.5})
    share(whole, config, "prompts")
    config.shards_dir.mkdir()
    (config.shards_dir / "00000.parquet.partial").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"^no space left for .*00000\.parquet"):
        regenerate(config, LeftOut())


def test_workers_of_ray_train_fit_one_drafter(pipeline, target_dir, tmp_path):
    whole, _, _ = pipeline
    config = recipe(target_dir, tmp_path, fit={"num_workers": 2, "cpus_per_worker": 0.5, "max_steps": 30})
    share(whole, config, "shards")
    fit(config)
    state = load_file(config.fit_dir / "state.safetensors")
    assert int(state["step"]) == 30
    assert json.loads((config.fit_dir / "run.json").read_text())["num_workers"] == 2
    assert (config.trained_dir / "model.safetensors").is_file()


def test_a_step_that_is_not_finite_on_one_worker_is_left_out_by_all(pipeline, target_dir, tmp_path):
    config = recipe(target_dir, tmp_path, fit={"num_workers": 2, "cpus_per_worker": 0.5, "max_steps": 30})
    poison(ShardStore(pipeline[0].shards_dir), config, every=30)
    num_skipped = fit(config)
    state, about = load_checkpoint(config.fit_dir / "state.safetensors")
    assert about.num_skipped == num_skipped > 0 and int(state["step"]) == 30
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_what_ends_a_run_on_all_workers_is_said_once_in_its_own_words(pipeline, target_dir, tmp_path):
    keys = {"num_workers": 2, "cpus_per_worker": 0.5, "max_steps": 2}
    share(pipeline[0], recipe(target_dir, tmp_path), "shards")
    fit(recipe(target_dir, tmp_path, fit=keys))
    changed = {"max_steps": 50, "learning_rate": 1e12, "changed_keys": ["fit.learning_rate"]}
    with pytest.raises(RunError, match=r"^fit: .* Lower fit\.learning_rate .* is kept$"):
        fit(recipe(target_dir, tmp_path, fit=keys | changed))
    with pytest.raises(RunError, match=r"was begun with other settings: .*fit\.loss \(was dpace, is decay\)"):
        fit(recipe(target_dir, tmp_path, fit={**keys, "loss": "decay"}))
