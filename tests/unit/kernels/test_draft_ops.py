"""How candidates are chosen: compiled, emulated and in plain torch, with ties, noise and values that are no numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.kernels import build
from dflash_ray.kernels.reference_drafts import top_candidates, walk_candidates
from tests.unit.kernels.libraries import load_emulated


@pytest.fixture(scope="module", params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def compiled(request):
    """(operators, device) of a library that has them."""
    if not build.is_loaded_for("cpu"):
        pytest.skip("no compiler: there are no operators here")
    if request.param == "emulated":
        load_emulated()
        return torch.ops.dflash_ray_emulated, "cpu"
    return torch.ops.dflash_ray, request.param


VALUES = [-np.inf, -3.0, -0.0, 0.0, 0.5, 7.0, np.inf, np.nan]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 17, 300, 1000]), st.integers(1, 40), st.integers(0, 3))
def test_candidates_are_the_largest_logits_and_of_equal_ones_the_lower_ids(compiled, seed, width, count, kind):
    operators, device = compiled
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(3, width))
    if kind:  # many are equal
        logits = np.round(logits, kind - 1) if kind < 3 else generator.choice(VALUES, size=logits.shape)
    rows, count = torch.tensor(logits, dtype=torch.float32), min(count, width)
    found = operators.top_candidates(rows.to(device), count)
    assert torch.equal(found.cpu(), top_candidates(rows, count))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.booleans(),
)
def test_a_walk_chooses_the_same_everywhere(compiled, seed, blocks, slots, count, temperature, has_ties):
    operators, device = compiled
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(blocks, slots, count, count)).astype(np.float32)
    scores = torch.from_numpy(scores.round() if has_ties else scores)
    ids = np.sort(np.stack([generator.permutation(200000)[: slots * count] for _ in range(blocks)]), axis=1)
    columns = (
        torch.from_numpy(ids.reshape(blocks, slots, count)),
        torch.tensor([0.0, temperature, 1.7][:blocks], dtype=torch.float64),
        torch.from_numpy(generator.integers(-(2**63), 2**63 - 1, blocks)),
        torch.from_numpy(generator.integers(0, 2**40, blocks)),
    )
    wanted = walk_candidates(scores, *columns)
    found = operators.walk_candidates(scores.to(device), *(column.to(device) for column in columns))
    assert torch.equal(found[0].cpu(), wanted[0])
    torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=1e-6, atol=1e-6)


def test_scores_that_are_no_numbers_leave_all_candidates_in_place(compiled):
    operators, device = compiled
    scores, ids = torch.full((1, 2, 3, 3), torch.nan), torch.tensor([[[1, 4, 6], [2, 3, 9]]])
    columns = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    ordered, _ = operators.walk_candidates(scores.to(device), ids.to(device), *(one.to(device) for one in columns))
    assert torch.equal(ordered.cpu(), ids)


@pytest.mark.parametrize(
    "calls",
    [lambda ops: ops.top_candidates(torch.zeros(1, 4), 5), lambda ops: ops.top_candidates(torch.zeros(1, 999), 257)],
)
def test_more_candidates_than_there_are_tokens_or_threads_are_refused(compiled, calls):
    with pytest.raises(RuntimeError, match="candidates of"):
        calls(compiled[0])


def test_the_operators_pass_torchs_checks():
    if not build.is_loaded_for("cpu"):
        pytest.skip("no compiler: there are no operators here")
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments = (
        torch.randn(2, 3, 4, 4),
        torch.arange(24).view(2, 3, 4),
        torch.ones(2, dtype=torch.float64),
        zeros,
        zeros,
    )
    torch.library.opcheck(torch.ops.dflash_ray.walk_candidates.default, arguments)
    torch.library.opcheck(torch.ops.dflash_ray.top_candidates.default, (torch.randn(5, 30), 4))
