"""Token counts are kept in the order of their ids, by the compiled operator as by the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.kernels import build, reference_verify, verify_ops
from dflash_ray.kernels.columns import IntColumn

pytestmark = pytest.mark.skipif(
    not build.is_loaded_for("cpu"), reason="no C++ compiler: operators run in plain torch here"
)
TOKENS = st.lists(st.integers(0, 49), max_size=12)


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_the_compiled_count_is_the_references(data):
    slots = data.draw(st.lists(st.integers(0, 3), unique=True, min_size=1))
    parts = [data.draw(TOKENS) for _ in slots]
    arguments = []
    for _ in range(2):
        ids, ints = torch.zeros(4, 64, dtype=torch.int64), torch.zeros(4, len(IntColumn), dtype=torch.int64)
        ids[:, 3:6] = torch.tensor([2, 9, 30])
        ints[:, IntColumn.HISTORY_AT], ints[:, IntColumn.HISTORY_LEN] = torch.arange(4) * 64 + 3, 3
        arguments.append((ids, torch.ones(4, 64), ints))
    step = (torch.tensor(slots), torch.tensor([len(part) for part in parts]))
    tokens = torch.tensor([token for part in parts for token in part], dtype=torch.int64)
    verify_ops.count_history(*arguments[0], *step, tokens)
    reference_verify.count_history(*arguments[1], *step, tokens)
    for mine, theirs in zip(*arguments, strict=True):
        assert torch.equal(mine, theirs)


def test_a_history_without_room_behind_it_is_refused():
    ints = torch.zeros(1, len(IntColumn), dtype=torch.int64)
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no room behind the history of slot 0"):
        verify_ops.count_history(
            torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), ints, one, one + 2, torch.zeros(2).long()
        )
