"""A DFlash 2 drafter goes on from a DFlash one, by the same steps."""

import json

import pytest
import torch

from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.fit import fit
from tests.training.conftest import recipe, run_step, save_recipe, share
from tests.training.test_pipeline import acceptance_length

DFLASH2 = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": 4}


@pytest.mark.parametrize("factorised", [False, True])
def test_a_dflash2_drafter_starts_with_the_drafts_of_the_drafter_it_goes_on_from(
    pipeline, target_dir, tmp_path, factorised
):
    config, _, before = pipeline
    mine = recipe(
        target_dir,
        tmp_path,
        drafter={"dflash2": DFLASH2 | {"factorised": factorised}},
        fit={"init_drafter": str(config.export.output_dir)},
    )
    share(config, mine, "shards", "prompts")
    recipe_file = save_recipe(mine, tmp_path / "recipe.yaml")
    run_step("fit", recipe_file, "fit.max_steps=0")
    run_step("evaluate", recipe_file, "evaluate.temperatures=[0.0]")
    start = json.loads(mine.results_file.read_text())["results"]
    for block_size in (4, 5):
        assert acceptance_length(start, 0.0, block_size) == pytest.approx(acceptance_length(before, 0.0, block_size))
    run_step("fit", recipe_file, "fit.max_steps=60")
    run_step("evaluate", recipe_file, "evaluate.temperatures=[0.0]")
    trained = json.loads(mine.results_file.read_text())["results"]
    assert acceptance_length(trained, 0.0, 5) > 0.9 * acceptance_length(start, 0.0, 5)
    target = resolve_target(mine.target)
    drafter = resolve_drafter(str(mine.trained_dir), target)
    assert drafter.config.dflash2 is not None
    assert ("candidate_selector.predecessor_codebook" in drafter.weights) is not factorised


def test_a_drafter_of_another_shape_is_no_beginning(pipeline, target_dir, tmp_path):
    config, _, _ = pipeline
    mine = recipe(
        target_dir,
        tmp_path,
        drafter={"init_layer_ids": [1]},
        fit={"init_drafter": str(config.export.output_dir), "max_steps": 0},
    )
    share(config, mine, "shards")
    with pytest.raises(ValueError, match=r"fit\.init_drafter"):
        fit(mine)


@pytest.mark.parametrize("factorised", [False, True])
def test_another_draft_vocabulary_hinders_only_codebooks_that_number_it(pipeline, target_dir, tmp_path, factorised):
    config, _, _ = pipeline
    shape = {"dflash2": DFLASH2 | {"factorised": factorised}}
    first = recipe(target_dir, tmp_path / "first", drafter=shape, fit={"max_steps": 0})
    second = recipe(
        target_dir,
        tmp_path / "second",
        drafter=shape | {"draft_vocab_size": 32},
        fit={"max_steps": 0, "init_drafter": str(first.trained_dir)},
    )
    share(config, first, "shards")
    share(config, second, "shards")
    fit(first)
    if not factorised:
        with pytest.raises(ValueError, match=r"fit\.init_drafter.*codebooks"):
            fit(second)
        return
    fit(second)
    target = resolve_target(second.target)
    before, after = (resolve_drafter(str(mine.trained_dir), target) for mine in (first, second))
    assert (len(before.draft_ids), len(after.draft_ids)) == (64, 32)
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items() if name != "d2t")
