"""What a new drafter's weights are before its first step."""

import json

import torch

from dflash_ray.models.drafter_checkpoint import load_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.fit import fit
from tests.training.conftest import recipe, run_step, save_recipe, share
from tests.training.test_pipeline import acceptance_length


def test_each_layer_starts_as_one_of_the_targets_or_at_random(pipeline, target_dir, tmp_path):
    config, _, _ = pipeline
    mine = recipe(target_dir, tmp_path, drafter={"init_layer_ids": [1, None]}, fit={"max_steps": 0})
    share(config, mine, "shards")
    fit(mine)
    target = resolve_target(mine.target)
    weights, base = load_drafter(mine.trained_dir, target).weights, target.load_model().get_decoder().state_dict()
    assert torch.equal(weights["layers.0.mlp.up_proj.weight"], base["layers.1.mlp.up_proj.weight"].bfloat16())
    assert torch.equal(weights["norm.weight"], base["norm.weight"].bfloat16())
    assert 0.032 < weights["layers.1.mlp.up_proj.weight"].float().std() < 0.037
    assert (weights["layers.1.input_layernorm.weight"] == 1).all()


def test_a_drafter_of_random_layers_learns(pipeline, target_dir, tmp_path):
    config, untrained, _ = pipeline
    mine = recipe(
        target_dir, tmp_path, drafter={"init_layer_ids": [None, None]}, fit={"optimizer": "muon", "learning_rate": 1e-2}
    )
    share(config, mine, "shards", "prompts")
    recipe_file = save_recipe(mine, tmp_path / "recipe.yaml")
    run_step("fit", recipe_file)
    run_step("evaluate", recipe_file, "evaluate.temperatures=[0.0]")
    trained = json.loads(mine.results_file.read_text())["results"]
    assert acceptance_length(trained, 0.0, 5) > acceptance_length(untrained, 0.0, 5) + 0.3
