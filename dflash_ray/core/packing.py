"""Several arrays as one flat int64 array and back, so that a step reaches the other ranks in one broadcast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def pack_arrays(arrays: Sequence[Array]) -> NDArray[np.int64]:
    """Header [count, lengths ...] and the values; floats travel as the bits of their float64."""
    header = np.array([len(arrays), *(len(array) for array in arrays)], dtype=np.int64)
    return np.concatenate([header, *(_to_bits(array) for array in arrays)])


def unpack_arrays(flat: NDArray[np.int64], dtypes: Sequence[Any]) -> list[Array]:
    """The arrays of `pack_arrays`, each with the dtype given for it."""
    count = int(flat[0])
    assert count == len(dtypes)
    arrays = []
    start = 1 + count
    for length, dtype in zip(flat[1 : 1 + count], dtypes, strict=True):
        bits = flat[start : start + int(length)]
        is_float = np.issubdtype(dtype, np.floating)
        arrays.append((bits.view(np.float64) if is_float else bits).astype(dtype))
        start += int(length)
    return arrays


def _to_bits(array: Array) -> NDArray[np.int64]:
    if np.issubdtype(array.dtype, np.floating):
        return array.astype(np.float64).view(np.int64)
    return array.astype(np.int64)
