"""The kinds of drafters that a configuration can name. A new one is an entry here and a file with its method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """What every process has to know of a kind.

    Attributes:
        loader: `module:function` that makes the method (models/draft_contexts.py, `DraftMethod`) of a configuration, in
            the drafter's process; the other processes never import it.
        reads_features: it drafts from the target's context features; otherwise from token ids alone.
    """

    loader: str
    reads_features: bool


DRAFTER_KINDS = {
    "dflash": DrafterKind("dflash_ray.drafter.dflash:load", reads_features=True),
    "dflash2": DrafterKind("dflash_ray.drafter.dflash:load", reads_features=True),
    "ngram": DrafterKind("dflash_ray.drafter.ngram:load", reads_features=False),
}
