"""Rows of many sessions, in parts and together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dflash_ray.drafter.rows import Rows, joined
from dflash_ray.models.context_features import bytes_of, pack
from dflash_ray.models.feature_pages import FeaturePages
from dflash_ray.pb import target_pb2


def tokens() -> Rows:
    sessions, starts, counts = np.array([[3, 5, 4], [10, 0, 7], [2, 1, 3]])
    return Rows.of(sessions, starts, counts, np.arange(100, 106, dtype=np.uint32))


def listed(parts: list[Rows]) -> list[tuple[int, int, int]]:
    """Session, position and token of every row."""
    rows = []
    for part in joined(parts)[0]:
        owners, ats = np.repeat(part.sessions, part.counts), np.concatenate([np.arange(n) for n in part.counts])
        rows += zip(
            owners.tolist(), (np.repeat(part.starts, part.counts) + ats).tolist(), part.token_ids.tolist(), strict=True
        )
    return rows


@pytest.mark.parametrize("num_rows", range(7))
def test_the_parts_of_a_split_have_all_rows_between_them_and_in_order(num_rows):
    head, tail = tokens().split(num_rows)
    assert head.num_rows == num_rows and tail.num_rows == 6 - num_rows
    assert head.counts.all() and tail.counts.all()
    parts = [part for part in (head, tail) if len(part.sessions)]
    assert listed(parts) == listed([tokens()])


def test_named_rows_and_sent_ones_become_one_input_and_sessions_with_rows_that_are_gone_are_left_out():
    pages = FeaturePages.create(4, 2, 1, torch.float32)
    pages.rows[:] = bytes_of(torch.arange(8, dtype=torch.float32)[:, None])
    columns = target_pb2.NamedFeatures(
        subscription_ids=[1, 2], starts=[1, 0], num_rows=[2, 2], pages=[3, 0, 1], uses=[0, 0, 0]
    )
    ints = np.array
    named = Rows.of(ints([6, 7]), ints([1, 0]), ints([2, 2]), pages.named(columns))
    sent = Rows.of(ints([7, 8]), ints([2, 5]), ints([1, 1]), pack(torch.tensor([[20.0], [30.0]])))
    [whole], gone = joined([named, sent])
    assert whole.features[:, 0].tolist() == [7.0, 0.0, 2.0, 3.0, 20.0, 30.0] and not gone
    pages.begin(ints([2]))
    [left], gone = joined([named, sent])
    assert gone == {7} and left.sessions.tolist() == [6, 8]
    assert left.features[:, 0].tolist() == [7.0, 0.0, 30.0]
