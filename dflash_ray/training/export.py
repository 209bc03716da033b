"""`export`: the drafter in the published layout, with a model card that says what it was made of and how it did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from dflash_ray.core.files import replacing, write_text
from dflash_ray.models.drafter_checkpoint import load_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.config import TrainingConfig
from dflash_ray.training.prompt_files import Prompt
from dflash_ray.training.shards import ShardStore


def export(config: TrainingConfig) -> Path:
    """Copies the drafter of `fit` to export.output_dir with README.md and training.yaml. Returns the directory.

    Raises ValueError when there is no drafter that fits the target.
    """
    output = config.export.output_dir
    drafter = load_drafter(config.trained_dir, resolve_target(config.target))
    run = json.loads((config.fit_dir / "run.json").read_text())
    for name in ("config.json", "model.safetensors"):
        with replacing(output / name) as partial:
            shutil.copyfile(config.trained_dir / name, partial)
    write_text(output / "training.yaml", yaml.safe_dump(run["config"], sort_keys=False))
    write_text(output / "README.md", _model_card(config, drafter.fingerprint, run))
    return output


def _model_card(config: TrainingConfig, fingerprint: str, run: dict[str, Any]) -> str:
    parts = [
        f"---\nlicense: {config.export.license}\ntags: [speculative-decoding, dflash]\n---",
        f"# {config.export.name}",
        f"A DFlash drafter (fingerprint `{fingerprint}`) for one target alone: the weights with fingerprint "
        f"`{resolve_target(config.target).fingerprint}`. A drafter changes when tokens come, never which.",
        "## Acceptance",
        _results(config, fingerprint),
        "## Data",
        _lineage(config, run),
        "## Recipe",
        f"{_changes(run)}Seed {run['seed']}; "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + ". Every figure is in `training.yaml`, which `dflash-ray train <step> --config training.yaml` reads.",
    ]
    return "\n\n".join(parts) + "\n"


def _changes(run: dict[str, Any]) -> str:
    """Settings that were others at first, as sentences."""
    return "".join(
        f"Up to step {one['step']} {one['key']} was {one['before']}, then {one['after']}. "
        for one in run.get("changes", [])
    )


def _results(config: TrainingConfig, fingerprint: str) -> str:
    """The table of `evaluate`, if it measured this drafter."""
    if config.results_file.is_file():
        values = json.loads(config.results_file.read_text())
        if values["drafter"] == fingerprint:
            return (
                "Measured by decoding held-out prompts with real verification; the acceptance length counts the "
                "target's own token.\n\n" + config.results_file.with_suffix(".md").read_text().strip()
            )
    return "Not measured."


def _lineage(config: TrainingConfig, run: dict[str, Any]) -> str:
    """Sources, counts and hashes of what the drafter was trained on."""
    store = ShardStore(*config.shard_dirs)
    if store.paths.keys() != run["shards"].keys():
        raise ValueError(f"{', '.join(map(str, config.shard_dirs))}: is not what `fit` ran on; run `fit` again")
    fraction = config.prompts.held_out_fraction
    counts: dict[str, list[int]] = {}
    for conversation in store.conversations:
        row = counts.setdefault(_source(conversation.prompt), [0, 0, 0])
        row[conversation.prompt.is_held_out(fraction)] += 1
        row[2] += len(conversation.token_ids) - conversation.prompt_len
    lines = ["All answers are the target's own.", "", "| source | trained on | held out | answer tokens |"]
    lines.append("|---|---|---|---|")
    lines += [f"| {source} | {n} | {held_out} | {tokens} |" for source, (n, held_out, tokens) in sorted(counts.items())]
    lines += ["", "SHA-256 of the shards:", ""]
    lines += [f"- `{name}` `{digest}`" for name, digest in run["shards"].items()]
    return "\n".join(lines)


def _source(prompt: Prompt) -> str:
    """As one cell of a table."""
    return " ".join(prompt.source.split()).replace("|", "/")
