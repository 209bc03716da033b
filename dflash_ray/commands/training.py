"""The steps of `dflash-ray train`: what each prints, and errors as one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dflash_ray.commands.terminal import console, fail
from dflash_ray.core.errors import RequestError
from dflash_ray.training.config import TrainingConfig, load_training_config


def _prompts(config: TrainingConfig) -> str:
    from dflash_ray.training.prompts import gather_prompts

    train, held_out = gather_prompts(config)
    return f"{train} prompts to train on, {held_out} held out, in {config.prompts_dir}"


def _regenerate(config: TrainingConfig) -> str:
    from dflash_ray.training.regenerate import regenerate

    return f"{regenerate(config)} shards in {config.shards_dir}"


def _capture(config: TrainingConfig) -> str:
    from dflash_ray.training.regenerate import capture

    return f"{capture(config)} shards in {config.shards_dir}"


def _fit(config: TrainingConfig) -> str:
    from dflash_ray.training.fit import fit

    fit(config)
    return f"drafter in {config.trained_dir}, curves in {config.fit_dir}/curves.png and {config.fit_dir}/events"


def _evaluate(config: TrainingConfig) -> str:
    from dflash_ray.training.evaluate import evaluate, markdown_table

    return markdown_table(evaluate(config), config.evaluate.confidence)


def _export(config: TrainingConfig) -> str:
    from dflash_ray.training.export import export

    return f"drafter in {export(config)}"


_STEPS: dict[str, Callable[[TrainingConfig], str]] = {
    "prompts": _prompts,
    "regenerate": _regenerate,
    "capture": _capture,
    "fit": _fit,
    "evaluate": _evaluate,
    "export": _export,
}


def run_step(name: str, config_path: Path | None, overrides: list[str]) -> None:
    """Runs one step and prints where its result is."""
    try:
        config = load_training_config(config_path, overrides)
        console.out(_STEPS[name](config))
    except (ValueError, OSError, RequestError) as error:  # their texts name the key, the line or the file
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(f"{error}; install the extra: pip install 'dflash-ray[train]'")
