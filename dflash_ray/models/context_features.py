"""Context features on the wire: rows as packed bytes of bounded size, and back."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dflash_ray.pb import target_pb2

FEATURE_PIECE_BYTES = 256 * 1024
_DTYPES = {target_pb2.DATA_TYPE_FLOAT32: torch.float32, target_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16}

with warnings.catch_warnings():  # torch says once a process that tensors over bytes must not be written to
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(4), dtype=torch.float32)


def rows_per_piece(width: int, dtype: torch.dtype) -> int:
    """Rows of `width` values that one message holds: FEATURE_PIECE_BYTES of them, or one."""
    return max(1, FEATURE_PIECE_BYTES // (width * _wire_dtype(dtype).itemsize))


def to_response(
    subscription_ids: list[int], starts: list[int], num_rows: list[int], rows: Tensor
) -> target_pb2.FeaturesResponse:
    """A message with features [sum of num_rows, H], one subscription's rows after the other's."""
    dtype = _wire_dtype(rows.dtype)
    response = target_pb2.FeaturesResponse()
    features = response.features  # filled in place: a message that is put into another one is copied
    features.subscription_ids.extend(subscription_ids)
    features.starts.extend(starts)
    features.num_rows.extend(num_rows)
    features.dtype = next(name for name, known in _DTYPES.items() if known is dtype)
    features.data = rows.to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return response


def rows_of(message: target_pb2.ContextFeatures, width: int) -> Tensor:
    """A message's features [sum of num_rows, width], to be read only; they share no memory with it.

    Raises ValueError when its columns and its data do not belong together.
    """
    dtype, count = _DTYPES.get(message.dtype), len(message.subscription_ids)
    if dtype is None:
        raise ValueError(f"features: dtype {message.dtype} is not known")
    if not len(message.starts) == len(message.num_rows) == count:
        raise ValueError(f"features: starts and num_rows must have {count} elements, one a subscription")
    num_rows, row_size = sum(message.num_rows), width * dtype.itemsize
    data = message.data  # a copy
    if len(data) != num_rows * row_size:
        raise ValueError(
            f"features: data has {len(data)} bytes for {num_rows} rows, each of {width} values of "
            f"{dtype.itemsize} bytes"
        )
    if not num_rows:
        return torch.empty(0, width, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(num_rows, width)


def _wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 stays; the others are widened, which loses nothing."""
    return dtype if dtype is torch.bfloat16 else torch.float32
