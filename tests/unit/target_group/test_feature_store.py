"""Kept rows of a pass lie in the store where their sequences' pages are, whoever copies them."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflash_ray.core.arrays import spans
from dflash_ray.target_group.commits import to_host
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.step import StepFeatures
from tests.loops import loops_in_numpy

WIDTH, NUM_ROWS, MOST = 3, 40, 5


@pytest.mark.parametrize("loops", [nullcontext, loops_in_numpy])
@pytest.mark.parametrize("brings_kept_rows_alone", [False, True])
@given(counts=st.lists(st.integers(0, MOST), max_size=6), order=st.permutations(range(NUM_ROWS)))
def test_rows_are_read_where_they_were_put_and_the_others_stay(loops, brings_kept_rows_alone, counts, order):
    store, pass_rows = FeatureStore(NUM_ROWS, WIDTH, torch.float32), torch.rand(6 * MOST, WIDTH)
    before = torch.zeros(NUM_ROWS, WIDTH)
    store._rows.copy_(before)
    num_rows, firsts = np.array(counts, dtype=np.int64), np.arange(len(counts)) * MOST
    places = np.array(order)[: num_rows.sum()]
    with loops():
        ids, starts = np.arange(len(counts), dtype=np.uint64), np.zeros_like(num_rows)
        features = StepFeatures(ids, starts, num_rows, firsts, pass_rows, places)
        store.put(to_host(features) if brings_kept_rows_alone else features)
    before[places] = pass_rows[spans(firsts, num_rows)]
    assert torch.equal(store._rows, before)
