"""Steps killed by SIGKILL go on where they stopped, to the result of a run that was never killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from dflash_ray.training.fit import fit
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompts import gather_prompts
from dflash_ray.training.regenerate import regenerate
from dflash_ray.training.shards import ShardStore
from tests.training.conftest import recipe, save_recipe, share

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 120


def kill_when_there_is(file: Path, step: str, recipe_file: Path) -> None:
    """Runs a step in a process of its own until `file` exists."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dflash_ray.cli", "train", step, "--config", str(recipe_file)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{step} ended or hangs"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_regenerate_goes_on_to_the_same_shards(pipeline, target_dir, tmp_path):
    uninterrupted, _, _ = pipeline
    config = recipe(target_dir, tmp_path)
    gather_prompts(config, LeftOut())
    kill_when_there_is(config.shards_dir / "00000.parquet", "regenerate", save_recipe(config, tmp_path / "recipe.yaml"))
    before = {path: path.stat().st_mtime_ns for path in config.shards_dir.glob("*.parquet")}
    regenerate(config, LeftOut())
    store, whole = ShardStore(config.shards_dir), ShardStore(uninterrupted.shards_dir)
    assert 0 < len(before) < len(store.paths)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert [path.read_bytes() for path in store.paths.values()] == [path.read_bytes() for path in whole.paths.values()]
    assert max(Counter(one.prompt.digest for one in store.conversations).values()) == 1


def test_a_killed_fit_goes_on_to_the_same_weights(pipeline, target_dir, tmp_path):
    uninterrupted, _, _ = pipeline
    config = recipe(target_dir, tmp_path, fit={"checkpoint_every_s": 0.2})
    share(uninterrupted, config, "shards")
    state_file = config.fit_dir / "state.safetensors"
    kill_when_there_is(state_file, "fit", save_recipe(config, tmp_path / "recipe.yaml"))
    assert 0 < int(load_file(state_file)["step"]) < config.fit.max_steps
    fit(config)
    state, whole = load_file(state_file), load_file(uninterrupted.fit_dir / "state.safetensors")
    assert state.keys() == whole.keys() and int(state["step"]) == config.fit.max_steps
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)
