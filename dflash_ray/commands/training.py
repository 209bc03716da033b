"""The steps of `dflash-ray train`: what each prints, and errors as one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dflash_ray.commands.terminal import console, fail
from dflash_ray.core.errors import RequestError
from dflash_ray.training.config import TrainingConfig, load_training_config
from dflash_ray.training.left_out import LeftOut


def _prompts(config: TrainingConfig) -> str:
    from dflash_ray.training.prompts import gather_prompts

    left_out = LeftOut()
    train, held_out = gather_prompts(config, left_out)
    return _with(f"{train} prompts to train on, {held_out} held out, in {config.prompts_dir}", left_out)


def _regenerate(config: TrainingConfig) -> str:
    from dflash_ray.training.regenerate import regenerate

    left_out = LeftOut()
    return _with(f"{regenerate(config, left_out)} shards in {config.shards_dir}", left_out)


def _capture(config: TrainingConfig) -> str:
    from dflash_ray.training.regenerate import capture

    left_out = LeftOut()
    return _with(f"{capture(config, left_out)} shards in {config.shards_dir}", left_out)


def _fit(config: TrainingConfig) -> str:
    from dflash_ray.training.fit import fit

    num_skipped = fit(config)
    skipped = f"{num_skipped} steps left out, as their loss or gradient was not finite; " if num_skipped else ""
    return (
        f"{skipped}drafter in {config.trained_dir}, curves in {config.fit_dir}/curves.png and {config.fit_dir}/events"
    )


def _evaluate(config: TrainingConfig) -> str:
    from dflash_ray.training.evaluate import evaluate, markdown_table

    left_out = LeftOut()
    return _with(markdown_table(evaluate(config, left_out), config.evaluate.confidence), left_out)


def _export(config: TrainingConfig) -> str:
    from dflash_ray.training.export import export

    return f"drafter in {export(config)}"


def _with(text: str, left_out: LeftOut) -> str:
    return f"{text}\n{left_out.text}" if left_out else text


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
