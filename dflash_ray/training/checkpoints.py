"""The state of a run in one file: weights, optimiser, step and the recipe that they came of; whole and finite, or not
written at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dflash_ray.core.files import replacing

Recipe = dict[str, Any]  # dotted keys
_ABOUT = "about"


class RunError(ValueError):
    """Ends a run on all its workers at the same step; starting them again would end it there again."""


@dataclass(frozen=True)
class About:
    """What a checkpoint says of itself.

    Attributes:
        recipe: what its weights follow from.
        num_skipped: steps that were left out so far.
        changes: settings that were changed on the way: step, key, before, after.
    """

    recipe: Recipe
    num_skipped: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises RunError, before anything of `path` is touched, when a value is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RunError(f"{path}: is not written, as {name} is not finite; what was there before is kept")


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: About) -> None:
    """Takes the place of the checkpoint before. Raises RunError for values that are not finite, DiskFullError."""
    check_finite(tensors, path)
    with replacing(path) as partial:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, {_ABOUT: json.dumps(asdict(about))})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], About]:
    """The tensors and what they came of. Raises RunError for what is not a whole checkpoint."""
    try:
        with safe_open(path, framework="pt") as stored:
            about = About(**json.loads(stored.metadata()[_ABOUT]))
            return {name: stored.get_tensor(name) for name in stored.keys()}, about  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: is not a checkpoint of `fit` ({error}); delete it to begin again") from None
