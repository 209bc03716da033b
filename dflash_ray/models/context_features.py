"""Context features on the wire: rows as packed bytes of bounded size, and back.

A message is made and read here by hand around its rows: protobuf would copy them twice on either side. The bytes are
those of FeaturesResponse in target.proto, whose `data` comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.core.arrays import Ints
from dflash_ray.pb import target_pb2

FEATURE_PIECE_BYTES = 512 * 1024
DTYPES = {target_pb2.DATA_TYPE_FLOAT32: torch.float32, target_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_VARINT, _BYTES = 0, 2  # how a field is encoded
_FEATURES_TAG = target_pb2.FeaturesResponse.FEATURES_FIELD_NUMBER << 3 | _BYTES
_DATA_TAG = target_pb2.ContextFeatures.DATA_FIELD_NUMBER << 3 | _BYTES

Bytes = NDArray[np.uint8]


class PackedRows(NamedTuple):
    """Rows as they travel.

    Attributes:
        dtype: float32 or bfloat16.
        parts: [n, bytes of a row] one after the other, each contiguous and not to be written to.
    """

    dtype: torch.dtype
    parts: Sequence[Bytes]

    def tensor(self) -> Tensor:
        """A copy [n, width]; there is at least one row."""
        return torch.from_numpy(np.concatenate(self.parts)).view(self.dtype)


def pack(rows: Tensor) -> PackedRows:
    """Rows [n, width] for the wire; they share memory where their dtype is one that travels."""
    dtype = wire_dtype(rows.dtype)
    return PackedRows(dtype, [bytes_of(rows.to("cpu", dtype).contiguous())])


def bytes_of(rows: Tensor) -> Bytes:
    """A view [n, bytes of a row] of rows that are contiguous on the host."""
    array: Bytes = rows.view(torch.uint8).numpy()
    return array


def select_rows(rows: Tensor, index: Ints) -> Tensor:
    """A copy of some of rows [n, width], on their device; on a host numpy is faster at it."""
    if rows.device.type != "cpu":
        return rows.index_select(0, torch.from_numpy(index).to(rows.device))
    return torch.from_numpy(bytes_of(rows.contiguous()).take(index, axis=0)).view(rows.dtype)


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 stays; the others are widened, which loses nothing."""
    return dtype if dtype is torch.bfloat16 else torch.float32


def dtype_name(dtype: torch.dtype) -> target_pb2.DataType:
    """What a dtype that travels is called on the wire."""
    return _NAMES[dtype]


def rows_per_piece(width: int, dtype: torch.dtype) -> int:
    """Rows of `width` values that one message holds: FEATURE_PIECE_BYTES of them, or one."""
    return max(1, FEATURE_PIECE_BYTES // (width * wire_dtype(dtype).itemsize))


def encode_features(
    subscription_ids: Sequence[int], starts: Sequence[int], num_rows: Sequence[int], rows: PackedRows
) -> bytes:
    """A FeaturesResponse with the rows of one subscription after the other's; they are copied once."""
    columns = target_pb2.ContextFeatures(
        subscription_ids=subscription_ids, starts=starts, num_rows=num_rows, dtype=_NAMES[rows.dtype]
    ).SerializeToString()
    size = sum(part.nbytes for part in rows.parts)
    head = b"%b%c%b" % (columns, _DATA_TAG, _varint(size))
    return b"".join((b"%c%b" % (_FEATURES_TAG, _varint(len(head) + size)), head, *(part.data for part in rows.parts)))


def decode_response(message: bytes) -> tuple[target_pb2.FeaturesResponse, memoryview]:
    """A FeaturesResponse without its features' data, and that, which shares the message's memory.

    Raises google.protobuf.message.DecodeError for bytes that are no FeaturesResponse.
    """
    places = _places(message)
    if places is None:  # another message, or one that was encoded in another order
        response = target_pb2.FeaturesResponse.FromString(message)
        data = response.features.data if response.HasField("features") else b""
        return response, memoryview(data)
    body, data_tag, start = places
    response = target_pb2.FeaturesResponse()
    response.features.MergeFromString(message[body:data_tag])
    return response, memoryview(message)[start:]


def rows_of(columns: target_pb2.ContextFeatures, data: memoryview, width: int) -> PackedRows:
    """A message's rows [sum of num_rows, width], which share its memory.

    Raises ValueError when its columns and its data do not belong together.
    """
    dtype, count = DTYPES.get(columns.dtype), len(columns.subscription_ids)
    if dtype is None:
        raise ValueError(f"features: dtype {columns.dtype} is not known")
    if not len(columns.starts) == len(columns.num_rows) == count:
        raise ValueError(f"features: starts and num_rows must have {count} elements, one a subscription")
    num_rows, row_size = sum(columns.num_rows), width * dtype.itemsize
    if len(data) != num_rows * row_size:
        raise ValueError(
            f"features: data has {len(data)} bytes for {num_rows} rows, each of {width} values of "
            f"{dtype.itemsize} bytes"
        )
    return PackedRows(dtype, [np.frombuffer(data, np.uint8).reshape(num_rows, row_size)])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends. Raises IndexError where the message ends before."""
    value = shift = 0
    while (byte := message[at]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
    return value | byte << shift, at + 1


def _places(message: bytes) -> tuple[int, int, int] | None:
    """Where the features begin, where their data's tag is, and where their data, which is the rest of the message.

    None for messages that are not of this form.
    """
    if not message or message[0] != _FEATURES_TAG:
        return None
    try:
        size, body = _read_varint(message, 1)
        if body + size != len(message):
            return None
        at = body
        while (tag := message[at]) != _DATA_TAG:
            size, after = _read_varint(message, at + 1)
            if tag & 0x80 or tag & 7 not in (_VARINT, _BYTES):
                return None
            at = after + size if tag & 7 == _BYTES else after
        size, start = _read_varint(message, at + 1)
    except IndexError:
        return None
    return (body, at, start) if start + size == len(message) else None
