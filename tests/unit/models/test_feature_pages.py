"""Rows of features that are named where they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dflash_ray.models.context_features import bytes_of, decode_response
from dflash_ray.models.feature_pages import FeaturePages, encode_named, pages_of
from dflash_ray.pb import target_pb2

NUM_PAGES, PAGE, WIDTH = 6, 4, 3


@pytest.fixture
def target() -> FeaturePages:
    pages = FeaturePages.create(NUM_PAGES, PAGE, WIDTH, torch.float32)
    assert pages is not None
    return pages


def values() -> torch.Tensor:
    return torch.arange(NUM_PAGES * PAGE, dtype=torch.float32)[:, None].expand(-1, WIDTH).contiguous()


def named(pages: list[int], starts: list[int], counts: list[int], uses: list[int]) -> target_pb2.NamedFeatures:
    numbers = list(range(len(starts)))
    message = encode_named(numbers, starts, counts, np.array(pages), np.array(uses))
    return decode_response(message)[0].named


def test_a_drafter_reads_rows_of_several_pages_where_the_target_wrote_them(target):
    drafter = FeaturePages.open(target.offer, WIDTH)
    target.rows[:] = bytes_of(values())
    rows = drafter.named(named([5, 0, 2, 3], starts=[2, 8, 3], counts=[4, 3, 1], uses=[0] * 4))
    assert rows.places.tolist() == [22, 23, 0, 1, 8, 9, 10, 15]
    index = np.array([1, 2, 7])
    out = np.empty((3, target.rows.shape[1]), dtype=np.uint8)
    rows.copy_to(out, index)
    assert torch.from_numpy(out).view(torch.float32)[:, 0].tolist() == [23.0, 0.0, 15.0]
    assert not rows.is_gone(np.arange(8)).any()


def test_rows_are_gone_once_their_page_is_begun_again_and_stay_while_it_is_filled(target):
    drafter = FeaturePages.open(target.offer, WIDTH)
    target.begin(np.array([4, 5]))
    rows = drafter.named(named([1, 2], starts=[0, 0], counts=[2, 2], uses=target.uses[[1, 2]].tolist()))
    target.begin(np.array([6, 7]))
    assert not rows.is_gone(np.arange(4)).any()
    target.begin(np.array([7, 8, 9]))
    assert rows.is_gone(np.arange(4)).tolist() == [False, False, True, True]


def test_pages_of_rows_are_those_that_they_touch():
    firsts, counts = pages_of(np.array([0, 3, 4, 7]), np.array([4, 2, 9, 1]), 4)
    assert firsts.tolist() == [0, 0, 1, 1] and counts.tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"pages": [1]}, "pages and uses must have 2"),
        ({"uses": [0, 0, 0]}, "pages and uses must have 2"),
        ({"pages": [1, NUM_PAGES]}, "page 6 of 6"),
        ({"starts": [0]}, "starts and num_rows must have 2"),
    ],
    ids=str,
)
def test_columns_that_do_not_belong_together_are_refused(target, columns, fault):
    whole = {"subscription_ids": [1, 2], "starts": [0, 0], "num_rows": [1, 1], "pages": [1, 2], "uses": [0, 0]}
    with pytest.raises(ValueError, match=fault):
        target.named(target_pb2.NamedFeatures(**(whole | columns)))


def test_features_of_another_width_are_refused(target):
    with pytest.raises(ValueError, match="width 3"):
        FeaturePages.open(target.offer, WIDTH + 1)


def test_features_that_are_widened_to_travel_are_not_shared():
    assert FeaturePages.create(NUM_PAGES, PAGE, WIDTH, torch.float16) is None
