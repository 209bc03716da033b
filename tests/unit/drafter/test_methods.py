"""A kind of drafter is an entry of the registry and a file."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import pytest

from dflash_ray.config import ConfigError, load_config
from dflash_ray.core.drafter_kinds import DRAFTER_KINDS, DrafterKind
from dflash_ray.drafter.methods import load_method
from dflash_ray.drafter.ngram import NgramMethod


@pytest.mark.parametrize("kind", DRAFTER_KINDS)
def test_every_kind_has_a_loader(kind):
    module, function = DRAFTER_KINDS[kind].loader.split(":")
    assert callable(getattr(import_module(module), function))


def test_an_entry_and_a_file_are_all_that_a_kind_needs(monkeypatch):
    file = ModuleType("own_drafter")
    file.load = lambda config: NgramMethod()
    monkeypatch.setitem(sys.modules, "own_drafter", file)
    monkeypatch.setitem(DRAFTER_KINDS, "own", DrafterKind("own_drafter:load", reads_features=False))
    config = load_config(None, ["drafter.method=own"])
    assert isinstance(load_method(config), NgramMethod)
    assert config.drafts_remotely and not config.uses_features


def test_an_unknown_kind_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"drafter\.method.*dflash, dflash2, ngram, or none"):
        load_config(None, ["drafter.method=eagle"])
