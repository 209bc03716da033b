"""What scheduler and controller tell each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core.arrays import Ints

Floats = NDArray[np.floating[Any]]


MOST_DRAFTS = 15  # of a sequence in a step, where a request names no number


class Policy(IntEnum):
    """How a sequence's drafts are counted."""

    OFF = 0
    FIXED = 1  # as many as it asks for, every step
    ADAPTIVE = 2  # as many as pay, at most as many as it asks for


class Reason(StrEnum):
    """Why a step was planned as it was."""

    FIXED = "fixed"  # no sequence leaves the choice open
    COLD = "cold"  # plain: the plain time of such a batch is not known yet
    PROBE = "probe"  # plain: its time is measured again
    REST = "rest"  # plain: the allowed loss is spent
    NO_GAIN = "no_gain"  # plain: nothing promises more
    TRIAL = "trial"  # drafts, to see what comes of them
    GAIN = "gain"  # drafts, which promise more


@dataclass(frozen=True, slots=True)
class Candidates:
    """Sequences that decode in a step, by column.

    Attributes:
        slots: of the sequences.
        room: drafts that may be of use to each.
        draft_room: of these, how many its drafter can give; 0 where none can draft.
        match_lens: of its n-gram's match, 0 where there is none.
        ngram_lens: tokens of its n-gram.
        parents: [n, MOST_DRAFTS] which draft each of its drafter's follows, as in `trees`; None where all are chains.
    """

    slots: Ints
    room: Ints
    draft_room: Ints
    match_lens: Ints
    ngram_lens: Ints
    parents: Ints | None = None


@dataclass(slots=True)
class SpeculationCounts:
    """Running totals: steps by reason; tokens of the steps that speculated, as expected and as they came."""

    steps: Counter[str] = field(default_factory=Counter)
    expected_tokens: float = 0.0
    realised_tokens: int = 0
