"""What the weights of a fit follow from, so that a run which goes on does so with the settings that it began with."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dflash_ray.training.checkpoints import Recipe, RunError
from dflash_ray.training.config import TrainingConfig

# Say how long, how often or where, never what is learnt. The content of shards and drafter counts, not their place.
_FREE = {
    "max_steps", "held_out_every_steps", "checkpoint_every_s", "device", "num_threads", "num_workers",
    "cpus_per_worker", "max_failures", "max_skipped_steps", "changed_keys", "shards", "init_drafter",
}  # fmt: skip


def recipe_of(config: TrainingConfig, target: str, shards: str, init_drafter: str | None) -> Recipe:
    """Dotted keys and values that may not change under way.

    Args:
        target, shards, init_drafter: fingerprints of what the paths of the configuration hold.
    """
    values: dict[str, Any] = {"target": target, "shards": shards, "fit.init_drafter": init_drafter, "seed": config.seed}
    values["prompts.held_out_fraction"] = config.prompts.held_out_fraction
    if config.fit.online_taps:
        values["engine.dtype"] = config.engine.dtype
    values |= {f"drafter.{key}": value for key, value in config.drafter.model_dump(mode="json").items()}
    values |= {f"fit.{key}": value for key, value in config.fit.model_dump(mode="json", exclude=_FREE).items()}
    return values


def changes_between(old: Recipe, new: Recipe, allowed: Collection[str], where: str) -> list[dict[str, Any]]:
    """The keys whose values differ, each with its value before and after.

    Raises RunError that names those which are not in `allowed`.
    """
    changes = [
        {"key": key, "before": old.get(key), "after": new.get(key)}
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    refused = [change for change in changes if change["key"] not in allowed]
    if refused:
        named = ", ".join(f"{one['key']} (was {one['before']}, is {one['after']})" for one in refused)
        raise RunError(
            f"{where}: was begun with other settings: {named}; set them back or use another work_dir. To go on with"
            " a new value of a key of `fit`, name it in fit.changed_keys"
        )
    return changes
