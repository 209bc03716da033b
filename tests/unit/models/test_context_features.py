"""Features go over the wire in pieces of bounded size and come back as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflash_ray.models.context_features import FEATURE_PIECE_BYTES, rows_of, to_pieces
from dflash_ray.pb import common_pb2

WIRE = {
    torch.float32: common_pb2.DATA_TYPE_FLOAT32,
    torch.bfloat16: common_pb2.DATA_TYPE_BFLOAT16,
    torch.float16: common_pb2.DATA_TYPE_FLOAT32,
}


@given(
    count=st.integers(1, 60),
    width=st.sampled_from([1, 48, 4096, 70_000]),
    dtype=st.sampled_from(list(WIRE)),
    start=st.integers(0, 2**20),
)
def test_pieces_are_bounded_follow_each_other_and_carry_every_row(count, width, dtype, start):
    rows = torch.arange(count * width).remainder(251).to(dtype).view(count, width)
    tokens = list(range(count))
    pieces = list(to_pieces(7, start, rows, tokens))
    at = start
    for piece in pieces:
        assert (piece.sequence_id, piece.start, piece.dtype) == (7, at, WIRE[dtype])
        assert piece.num_rows == 1 or len(piece.data) <= FEATURE_PIECE_BYTES
        at += piece.num_rows
    assert at == start + count
    assert torch.equal(torch.cat([rows_of(piece, width) for piece in pieces]).to(dtype), rows)
    assert [token for piece in pieces for token in piece.token_ids] == tokens


def test_a_piece_is_as_full_as_it_may_be():
    pieces = list(to_pieces(1, 0, torch.zeros(1000, 4096, dtype=torch.bfloat16), range(1000)))
    assert [piece.num_rows for piece in pieces] == [32] * 31 + [8]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"dtype": 0}, "dtype 0"),
        ({"dtype": 9}, "dtype 9"),
        ({"data": b"123"}, "3 bytes for 2 rows"),
        ({"num_rows": 3}, "for 3 rows"),
        ({"num_rows": 0}, "for 0 rows"),
        ({"num_rows": 2**32 - 1}, "for 4294967295 rows"),
    ],
)
def test_a_malformed_message_is_named(change, fault):
    message = next(to_pieces(5, 0, torch.zeros(2, 4), [1, 2]))
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(ValueError, match=f"sequence 5.*{fault}|{fault}.*sequence 5"):
        rows_of(message, 4)


def test_no_rows_are_no_fault():
    message = common_pb2.ContextFeatures(sequence_id=5, dtype=common_pb2.DATA_TYPE_BFLOAT16)
    assert rows_of(message, 4).shape == (0, 4)
