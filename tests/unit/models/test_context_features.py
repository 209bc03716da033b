"""Features go over the wire as packed rows of bounded size and come back as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflash_ray.models.context_features import FEATURE_PIECE_BYTES, rows_of, rows_per_piece, to_response
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
)
def test_rows_of_several_sequences_come_back_as_they_were(counts, width, dtype):
    rows = torch.arange(sum(counts) * width).remainder(251).to(dtype).view(-1, width)
    numbers, starts = list(range(len(counts))), [10 * count for count in counts]
    message = to_response(numbers, starts, counts, rows).features
    assert (list(message.subscription_ids), list(message.starts), list(message.num_rows)) == (numbers, starts, counts)
    assert message.dtype == WIRE[dtype] and torch.equal(rows_of(message, width).to(dtype), rows)


@pytest.mark.parametrize(
    ("width", "dtype", "expected"),
    [(4096, torch.bfloat16, 32), (4096, torch.float32, 16), (4096, torch.float16, 16), (70_000, torch.float32, 1)],
)
def test_a_piece_has_as_many_rows_as_its_bound_allows_and_one_at_least(width, dtype, expected):
    assert rows_per_piece(width, dtype) == expected
    message = to_response([1], [0], [expected], torch.zeros(expected, width, dtype=dtype)).features
    assert expected == 1 or len(message.data) <= FEATURE_PIECE_BYTES


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
    message = to_response([5], [0], [2], torch.zeros(2, 4)).features
    for name, value in change.items():
        if isinstance(value, list):
            getattr(message, name)[:] = value
        else:
            setattr(message, name, value)
    with pytest.raises(ValueError, match=fault):
        rows_of(message, 4)


def test_no_rows_are_no_fault():
    assert rows_of(target_pb2.ContextFeatures(dtype=target_pb2.DATA_TYPE_BFLOAT16), 4).shape == (0, 4)
