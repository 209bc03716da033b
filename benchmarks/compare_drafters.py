"""Trains variants of a recipe on the same shards and compares them on the same recorded answers.

    dflash-ray train regenerate --config recipe.yaml      # the shards to train on
    python benchmarks/compare_drafters.py --config recipe.yaml --variants benchmarks/drafter_variants.yaml

The recipe's evaluate.answers are the recorded answers. A variant that was trained before is not trained again.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml

from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint, load_drafter
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.training.config import TrainingConfig, load_training_config
from dflash_ray.training.evaluate import ALL, follow_whole_blocks
from dflash_ray.training.fit import fit

_CONTEXT_ROWS = 200
_ROUNDS = 40


def main(
    config: Annotated[Path, typer.Option(help="recipe")],
    variants: Annotated[Path, typer.Option(help="YAML: name of a variant to its overrides of the recipe")],
    category: Annotated[str, typer.Option(help="category with a column of its own")] = "gsm8k test",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key.sub=value for all variants")] = None,
) -> None:
    """Prints a table with a line for each variant."""
    target = resolve_target(load_training_config(config).target)
    shards = load_training_config(config, set_ or ()).shard_dirs
    rows, drafters = [], []
    for name, overrides in yaml.safe_load(variants.read_text()).items():
        recipe = load_training_config(config, [*(set_ or ()), *(overrides or ())])
        work_dir = recipe.work_dir / "variants" / name.replace(" ", "-")
        section = recipe.fit.model_copy(update={"shards": shards})
        recipe = recipe.model_copy(update={"work_dir": work_dir, "fit": section})
        drafter, seconds = _trained(recipe, target)
        drafters.append(drafter)
        rows.append([name, str(recipe.fit.max_steps), f"{seconds:.0f}", *_lengths(recipe, drafter, target, category)])
        typer.echo(" | ".join(rows[-1]), err=True)
    for row, milliseconds in zip(rows, _draft_milliseconds(drafters, target), strict=True):
        row.append(f"{milliseconds:.1f}")
    head = ["variant", "steps", "seconds", "all", category, "trees of 7, 15", "accepted at slot 1, 2, ...", "draft, ms"]
    for row in [head, ["---"] * len(head), *rows]:
        typer.echo("| " + " | ".join(row) + " |")


def _trained(recipe: TrainingConfig, target: TargetCheckpoint) -> tuple[DrafterCheckpoint, float]:
    """The drafter of a variant and the seconds that its training took; 0 when it was there already."""
    if (recipe.trained_dir / "config.json").is_file():
        return load_drafter(recipe.trained_dir, target), 0.0
    start = time.monotonic()
    fit(recipe)
    return load_drafter(recipe.trained_dir, target), time.monotonic() - start


def _lengths(recipe: TrainingConfig, drafter: DrafterCheckpoint, target: TargetCheckpoint, category: str) -> list[str]:
    """Acceptance lengths at the drafter's own block size."""
    by_category = follow_whole_blocks(recipe, drafter, target)
    total = by_category[ALL]
    return [
        f"{total.acceptance_length:.2f} ({total.low:.2f} to {total.high:.2f})",
        f"{by_category[category].acceptance_length:.2f}" if category in by_category else "",
        ", ".join(f"{length:.2f}" for length in total.tree_acceptance_lengths.values()),
        " ".join(f"{share:.0%}" for share in total.accepted_at),
    ]


def _draft_milliseconds(drafters: list[DrafterCheckpoint], target: TargetCheckpoint) -> list[float]:
    """Median time of one sequence's draft pass of each drafter, measured in turns."""
    ready = [BlockDrafter(drafter, target) for drafter in drafters]
    for drafter in ready:
        drafter.open(0)
        drafter.extend_one(0, 0, torch.randn(_CONTEXT_ROWS, drafter.config.hidden_size))
    times: list[list[float]] = [[] for _ in ready]
    for _ in range(_ROUNDS):
        for drafter, taken in zip(ready, times, strict=True):
            start = time.perf_counter()
            drafter.propose([0], [1], [drafter.max_draft_tokens], 1)
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    typer.run(main)
