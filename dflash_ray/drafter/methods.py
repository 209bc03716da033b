"""From the configured kind of drafter to the method that a replica serves."""

from __future__ import annotations

from importlib import import_module

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.drafter_kinds import DRAFTER_KINDS
from dflash_ray.models.draft_contexts import DraftMethod


def load_method(config: DflashRayConfig) -> DraftMethod:
    """The method, its weights loaded. Raises ValueError when its checkpoint does not fit the target."""
    module, function = DRAFTER_KINDS[config.drafter.method].loader.split(":")
    method: DraftMethod = getattr(import_module(module), function)(config)
    return method
