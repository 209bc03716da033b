"""Context features on the wire: rows of a sequence as messages of bounded size, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dflash_ray.pb import common_pb2

FEATURE_PIECE_BYTES = 256 * 1024
_DTYPES = {common_pb2.DATA_TYPE_FLOAT32: torch.float32, common_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16}


def rows_per_piece(width: int, dtype: torch.dtype) -> int:
    """Rows of `width` values that one message holds: FEATURE_PIECE_BYTES of them, or one."""
    return max(1, FEATURE_PIECE_BYTES // (width * _wire_dtype(dtype).itemsize))


def to_pieces(
    sequence_id: int, start: int, rows: Tensor, token_ids: Sequence[int]
) -> Iterator[common_pb2.ContextFeatures]:
    """Messages with features [n, H] of positions start, start + 1, ... and the tokens there, in order."""
    dtype = _wire_dtype(rows.dtype)
    rows = rows.to("cpu", dtype)
    count = rows_per_piece(rows.shape[1], dtype)
    for at in range(0, len(rows), count):
        piece = rows[at : at + count].contiguous()
        yield common_pb2.ContextFeatures(
            sequence_id=sequence_id,
            start=start + at,
            num_rows=len(piece),
            dtype=next(name for name, known in _DTYPES.items() if known is dtype),
            data=piece.view(torch.uint8).numpy().tobytes(),
            token_ids=token_ids[at : at + count],
        )


def rows_of(message: common_pb2.ContextFeatures, width: int | None = None) -> Tensor:
    """A message's features [num_rows, H], which share no memory with it.

    Raises ValueError when it is malformed, or H is not `width`.
    """
    dtype, count = _DTYPES.get(message.dtype), message.num_rows
    if dtype is None:
        raise ValueError(f"dtype {message.dtype} of sequence {message.sequence_id} is not known")
    if not count and not message.data:
        return torch.empty(0, width or 0, dtype=dtype)
    row_size = len(message.data) // max(1, count) if width is None else width * dtype.itemsize
    if len(message.data) != count * row_size or row_size % dtype.itemsize:
        raise ValueError(
            f"data of sequence {message.sequence_id} has {len(message.data)} bytes for {count} rows, "
            f"each of {width or 'as many'} values of {dtype.itemsize} bytes"
        )
    return torch.frombuffer(bytearray(message.data), dtype=dtype).view(count, -1)


def _wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 stays; the others are widened, which loses nothing."""
    return dtype if dtype is torch.bfloat16 else torch.float32
