"""A verification plan as columns: what the operators know of a step's rows and sequences.

Rows form a forest: the root of a sequence is its last committed token, the other rows are draft nodes after their
parents. The token drawn at a row stands one position after the row's own token. The order of the columns is that of
csrc/verify_core.cuh.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class RowColumn(IntEnum):
    """Of `rows`: sequence index, position of the token drawn, the row's own token, row of the parent or -1."""

    SEQUENCE = 0
    POSITION = 1
    TOKEN = 2
    PARENT = 3


class IntColumn(IntEnum):
    """Of `ints`. Pairs of `_AT` and `_LEN` are ranges of `ids` and `values`; history ids ascend.

    BAN_BELOW: banned tokens may not be drawn for positions below it. MIN_LEN: a stop token ends sequences that are
    longer. MAX_LEN: length at which a sequence ends. FEATURE_ROW: row of the root in the features, or -1.
    """

    SEED = 0
    MODE = 1
    TOP_K = 2
    FIRST_ROW = 3
    NUM_ROWS = 4
    ROOT_POSITION = 5
    BAN_BELOW = 6
    MIN_LEN = 7
    MAX_LEN = 8
    FEATURE_ROW = 9
    HISTORY_AT = 10
    HISTORY_LEN = 11
    BIAS_AT = 12
    BIAS_LEN = 13
    BANNED_AT = 14
    BANNED_LEN = 15
    STOP_AT = 16
    STOP_LEN = 17


class FloatColumn(IntEnum):
    """Of `floats`. INV_TEMPERATURE is 0 for greedy sequences, LOG_MIN_P is -inf where min-p is off."""

    INV_TEMPERATURE = 0
    TOP_P = 1
    LOG_MIN_P = 2
    PRESENCE = 3
    FREQUENCY = 4
    REPETITION = 5


class Mode(IntEnum):
    """How drafts are verified."""

    COUPLED = 0
    REJECTION = 1


class Finish(IntEnum):
    """How a commit leaves a sequence."""

    GOES_ON = 0
    STOP = 1
    LENGTH = 2


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes are independent."""

    TARGET = 0
    ACCEPT = 1
    RESIDUAL = 2


class Partial(IntEnum):
    """Of a shard's numbers a row. MASS and one mass for each draft candidate after it only in rejection mode."""

    SCORE = 0
    TOKEN = 1
    MAXIMUM = 2
    IS_BAD = 3
    MASS = 4


class StateColumn(IntEnum):
    """Of a threshold's state a row: key bits fixed so far, weight still wanted, key of the lowest kept value."""

    PREFIX = 0
    WANTED = 1
    FLOOR_KEY = 2


class OutcomeColumn(IntEnum):
    """Of an outcome a sequence; `depth` tokens and `depth` accepted rows, from the root on, follow; -1 for none."""

    NUM_ACCEPTED = 0
    IS_FLAGGED = 1
    TOKENS = 2


class CommitColumn(IntEnum):
    """Of a commit a sequence: tokens kept, `Finish`, rows kept, length of its KV."""

    NUM_TOKENS = 0
    FINISH = 1
    NUM_ROWS = 2
    KV_LEN = 3


NUM_BINS = 256
NUM_TOP_K_ROUNDS = 4  # rounds 0 to 3 narrow top-k, 4 to 7 top-p
MASS_UNIT = 2.0**32  # masses are multiples of 2**-32 of the likeliest token's


class PlanTensors(NamedTuple):
    """rows int64 [R, 4], ints int64 [S, 18], floats float32 [S, 6], ids int64 [E], values float32 [E]."""

    rows: Tensor
    ints: Tensor
    floats: Tensor
    ids: Tensor
    values: Tensor
