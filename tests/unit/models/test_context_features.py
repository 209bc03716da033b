"""Features go over the wire as packed rows of bounded size and come back as they were."""

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from dflash_ray.models.context_features import (
    FEATURE_PIECE_BYTES,
    PackedRows,
    decode_response,
    encode_features,
    pack,
    rows_of,
    rows_per_piece,
)
from dflash_ray.pb import target_pb2

WIRE = {
    torch.float32: target_pb2.DATA_TYPE_FLOAT32,
    torch.bfloat16: target_pb2.DATA_TYPE_BFLOAT16,
    torch.float16: target_pb2.DATA_TYPE_FLOAT32,
}


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    width=st.sampled_from([1, 48, 4096]),
    dtype=st.sampled_from(list(WIRE)),
    first=st.integers(0, 2**40),
)
def test_rows_of_several_sequences_come_back_as_they_were_and_protobuf_reads_the_same(counts, width, dtype, first):
    rows = torch.arange(sum(counts) * width).remainder(251).to(dtype).view(-1, width)
    numbers, starts = [first + at for at in range(len(counts))], [10 * count for count in counts]
    (packed,) = pack(rows).parts
    parts = np.split(packed, np.cumsum(counts)[:-1])
    message = encode_features(numbers, starts, counts, PackedRows(pack(rows).dtype, parts))
    response, data = decode_response(message)
    columns = response.features
    assert (list(columns.subscription_ids), list(columns.starts), list(columns.num_rows)) == (numbers, starts, counts)
    assert columns.dtype == WIRE[dtype] and not columns.data
    assert torch.equal(rows_of(columns, data, width).tensor().to(dtype), rows)
    columns.data = bytes(data)
    assert response == target_pb2.FeaturesResponse.FromString(message)
    assert response.SerializeToString() == message


@given(junk=st.binary(max_size=40), cut=st.integers(0, 60))
def test_bytes_that_are_no_message_are_refused_and_other_messages_are_read(junk, cut):
    message = encode_features([300], [5], [2], pack(torch.zeros(2, 3)))
    for data in (junk, message[:cut], message[: len(message) - 1 - cut % 20] + junk):
        try:
            expected = target_pb2.FeaturesResponse.FromString(data)
        except DecodeError:
            with pytest.raises(DecodeError):
                decode_response(data)
            continue
        response, rows = decode_response(data)
        if response.HasField("features"):
            response.features.data = bytes(rows)
            expected.features.data = expected.features.data
        assert response == expected


def test_features_whose_fields_came_in_another_order_are_read_as_well():
    message = target_pb2.FeaturesResponse.FromString(encode_features([7], [0], [1], pack(torch.ones(1, 3))))
    data = target_pb2.ContextFeatures(data=message.features.data).SerializeToString()
    message.features.ClearField("data")
    body = data + message.features.SerializeToString()
    response, rows = decode_response(bytes([message.FEATURES_FIELD_NUMBER << 3 | 2, len(body)]) + body)
    assert torch.equal(rows_of(response.features, rows, 3).tensor(), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("width", "dtype", "expected"),
    [(4096, torch.bfloat16, 64), (4096, torch.float32, 32), (4096, torch.float16, 32), (140_000, torch.float32, 1)],
)
def test_a_piece_has_as_many_rows_as_its_bound_allows_and_one_at_least(width, dtype, expected):
    assert rows_per_piece(width, dtype) == expected
    (rows,) = pack(torch.zeros(expected, width, dtype=dtype)).parts
    assert expected == 1 or rows.nbytes <= FEATURE_PIECE_BYTES


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"dtype": 0}, "dtype 0"),
        ({"dtype": 9}, "dtype 9"),
        ({"data": b"123"}, "3 bytes for 2 rows"),
        ({"num_rows": [3]}, "for 3 rows"),
        ({"num_rows": [0]}, "for 0 rows"),
        ({"num_rows": [2**32 - 1]}, "for 4294967295 rows"),
        ({"num_rows": []}, "num_rows"),
        ({"starts": [1, 2]}, "starts"),
    ],
)
def test_a_malformed_message_is_named(change, fault):
    response, data = decode_response(encode_features([5], [0], [2], pack(torch.zeros(2, 4))))
    for name, value in change.items():
        if isinstance(value, list):
            getattr(response.features, name)[:] = value
        elif name == "data":
            data = memoryview(value)
        else:
            setattr(response.features, name, value)
    with pytest.raises(ValueError, match=fault):
        rows_of(response.features, data, 4)


def test_no_rows_are_no_fault():
    columns = target_pb2.ContextFeatures(dtype=target_pb2.DATA_TYPE_BFLOAT16)
    assert [part.shape for part in rows_of(columns, memoryview(b""), 4).parts] == [(0, 8)]
