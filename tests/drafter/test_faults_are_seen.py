"""The parity check can fail: each of four classic faults makes it raise."""

import dataclasses

import pytest
import torch

from dflash_ray.models import block_drafter, drafter_checkpoint
from dflash_ray.models.compiled_drafts import CompiledContexts
from dflash_ray.models.context_passes import ContextProjection
from dflash_ray.models.draft_layers import CompiledLayers, DeviceLayers
from tests.drafter.parity import assert_parity
from tests.drafter.published import save_random, sliding

pytestmark = pytest.mark.usefixtures("needs_reference")


def change_config(monkeypatch, **change) -> None:
    """Checkpoints load with `change(config)` in place of what config.json says."""
    parse = drafter_checkpoint.parse_dflash_config

    def parse_wrongly(values, where):
        config = parse(values, where)
        return dataclasses.replace(config, **{key: wrong(config) for key, wrong in change.items()})

    monkeypatch.setattr(drafter_checkpoint, "parse_dflash_config", parse_wrongly)


class StoredByTorch:
    """Context rows as the projection makes them, where an operator makes all of them."""

    def __init__(self, projection: ContextProjection) -> None:
        self._projection = projection

    def __call__(self, positions, rows, features, pages) -> None:
        pages.store(torch.from_numpy(rows), *self._projection(torch.from_numpy(positions), features))


def context_keys_without_norm(monkeypatch) -> None:
    monkeypatch.setattr(block_drafter, "CompiledContexts", lambda projection, eps: StoredByTorch(projection))
    monkeypatch.setattr(ContextProjection, "_normed", lambda self, keys: keys)


def context_rotated_one_position_late(monkeypatch) -> None:
    right = CompiledContexts.__call__
    monkeypatch.setattr(CompiledContexts, "__call__", lambda self, at, *rows: right(self, at + 1, *rows))


def block_rotated_one_position_late(monkeypatch) -> None:
    """The context is right here, so only the drafts can show it."""
    for kind in (CompiledLayers, DeviceLayers):

        def wrong(self, x, cos, sin, *where, right=kind.__call__):
            return right(self, x, cos.roll(-1, 0), sin.roll(-1, 0), *where)

        monkeypatch.setattr(kind, "__call__", wrong)


def taps_one_layer_late(monkeypatch) -> None:
    change_config(monkeypatch, target_layer_ids=lambda config: tuple(layer + 1 for layer in config.target_layer_ids))


def mask_turned_round(monkeypatch) -> None:
    change_config(monkeypatch, is_causal=lambda config: tuple(not causal for causal in config.is_causal))


def window_one_row_wider(monkeypatch) -> None:
    change_config(monkeypatch, windows=lambda config: tuple(window and window + 1 for window in config.windows))


FAULTS = [
    context_keys_without_norm,
    context_rotated_one_position_late,
    block_rotated_one_position_late,
    taps_one_layer_late,
    mask_turned_round,
    window_one_row_wider,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_makes_the_parity_check_fail(fault, target, tmp_path, monkeypatch):
    save_random(tmp_path, sliding("sliding", "full"))
    assert_parity(tmp_path, target)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        assert_parity(tmp_path, target)
