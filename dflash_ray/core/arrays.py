"""Types of arrays that many modules share, and what is done to them in more than one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

_TOKEN_IDS = np.dtype("<u4")
_FEW = 64

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.uint64]  # of others' making
Tokens = npt.NDArray[np.uint32]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def spans(starts: Ints, counts: Ints) -> Ints:
    """The numbers starts[i], starts[i] + 1, ... of which there are counts[i], for one i after the other."""
    ends = counts.cumsum()
    numbers: Ints = np.arange(int(ends[-1]) if len(ends) else 0)
    numbers += np.repeat(starts - ends + counts, counts)
    return numbers


def are_ones(counts: Ints, total: int) -> bool:
    """Whether counts, none of which is negative and whose sum is `total`, are all 1."""
    return total == len(counts) == np.count_nonzero(counts)


@overload
def column(field: Sequence[int]) -> Ints: ...
@overload
def column(field: Sequence[int], dtype: type[np.uint64]) -> Ids: ...
def column(field: Sequence[int], dtype: type[np.integer[Any]] = np.int64) -> npt.NDArray[Any]:
    """A repeated field of integers as an array."""
    # protobuf hands over its own array, which is faster than a list where there are many elements, and not before.
    return np.array(field[:] if len(field) <= _FEW else field, dtype=dtype)


def packed(token_ids: Tokens | Ints) -> bytes:
    """Token ids as they travel."""
    return token_ids.astype(_TOKEN_IDS, copy=False).tobytes()


def unpacked(name: str, data: bytes) -> Tokens:
    """Token ids that travelled in the field `name`. Raises ValueError for bytes that are none."""
    if len(data) % _TOKEN_IDS.itemsize:
        raise ValueError(f"{name} has {len(data)} bytes, which are no whole number of token ids")
    return np.frombuffer(data, dtype=_TOKEN_IDS)
