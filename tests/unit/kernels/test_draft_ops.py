"""How candidates are chosen: compiled, emulated and in plain torch, with ties, noise and values that are no numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.kernels import build, draft_ops, ops
from dflash_ray.kernels.reference_drafts import top_candidates, walk_candidates
from dflash_ray.models.dflash import apply_rope
from dflash_ray.models.packed_linear import PackedLinear
from tests.unit.kernels.libraries import load_emulated

needs_compiler = pytest.mark.skipif(not build.is_loaded_for("cpu"), reason="no compiler: there are no operators here")


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


def choice_arguments(seed: int, blocks: int, block: int, slots: int, has_ids: bool, wants_scores: bool = True) -> dict:
    """Of `choose_drafts`, with a head for 40 tokens, and a selector of rank 5 that keeps 4."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(40 * 24 + 5 * 24 + 2 * 40 * 5 + 24 + blocks * block * 24, generator=generator)
    head, projection, *books, norm, rows = normal.split([40 * 24, 5 * 24, 200, 200, 24, blocks * block * 24])
    ids = torch.arange(40) * 3 + 2 if has_ids else torch.empty(0, dtype=torch.int64)
    weights = draft_ops.ChoiceWeights(
        norm, PackedLinear(head.view(40, 24)).weight, PackedLinear(projection.view(5, 24)).weight,
        books[0].view(40, 5), books[1].view(40, 5), ids,
    )  # fmt: skip
    return {
        "plain": (head.view(40, 24), projection.view(5, 24)),
        "rows": rows.view(-1, 24).contiguous(),
        "weights": weights,
        "anchors": torch.randint(0, 125 if has_ids else 40, (blocks,), generator=generator),
        "inverse_temperatures": torch.tensor([0.0, 1.25, 0.5][:blocks], dtype=torch.float64),
        "seeds": torch.arange(blocks) + 7,
        "firsts": torch.arange(blocks) * 11 + 3,
        "block": block,
        "num_slots": slots,
        "num_candidates": 4,
        "eps": 1e-6,
        "multiplier": 0.5,
        "softcap": 3.0,
        "wants_scores": wants_scores,
    }


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 9), st.integers(1, 8), st.booleans())
def test_drafts_chosen_in_one_are_those_of_head_candidates_scores_and_walk(seed, blocks, block, slots, has_ids):
    slots = min(slots, block - 1)
    arguments = choice_arguments(seed, blocks, block, slots, has_ids)
    (head, projection), weights = arguments.pop("plain"), arguments["weights"]
    hidden = arguments["rows"].view(blocks, block, -1)[:, 1 : 1 + slots]
    hidden = ops.rms_norm(hidden, weights.norm, 1e-6)
    logits = 3.0 * torch.tanh(hidden @ head.T * 0.5 / 3.0)
    found = top_candidates(logits.flatten(0, 1), 4).view(blocks, slots, 4)
    anchors = arguments["anchors"]
    if has_ids:
        anchors = (torch.searchsorted(weights.ids, anchors, right=True) - 1).clamp(min=0)
    before = torch.cat((anchors[:, None, None].expand(-1, 1, 4), found[:, :-1]), dim=1)
    edges = weights.predecessors[before] * (hidden @ projection.T)[:, :, None]
    scores = logits.gather(-1, found)[:, :, None] + edges @ weights.successors[found].transpose(-1, -2)
    tokens = weights.ids[found] if has_ids else found
    draws = (arguments["inverse_temperatures"], arguments["seeds"], arguments["firsts"])
    wanted = (*walk_candidates(scores, tokens, *draws), tokens, scores)
    got = draft_ops.choose_drafts(**arguments)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[2], wanted[2])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[3], wanted[3], rtol=1e-4, atol=1e-4)
    plain = draft_ops.choose_drafts(**arguments | {"wants_scores": False})
    assert torch.equal(plain[0], got[0]) and torch.equal(plain[1], got[1]) and plain[3].numel() == 0


@needs_compiler
def test_an_anchor_that_the_vocabulary_has_not_is_refused():
    arguments = choice_arguments(0, 2, 4, 3, has_ids=False)
    del arguments["plain"]
    with pytest.raises(IndexError, match="anchor 40 of 40"):
        draft_ops.choose_drafts(**arguments | {"anchors": torch.tensor([3, 40])})


def context_arguments(count: int) -> dict:
    generator = torch.Generator().manual_seed(count)
    weight, bias = torch.randn(2 * 2 * 3 * 8, 24, generator=generator), torch.randn(96, generator=generator)
    layer = PackedLinear(weight, bias)
    pools = torch.zeros(2, 2, 200, 3, 8)
    return {
        "plain": (weight, bias),
        "features": torch.randn(count, 24, generator=generator),
        "weight": layer.weight,
        "bias": layer.bias,
        "norms": torch.rand(2, 1, 8, generator=generator) + 0.5,
        "cos": torch.randn(300, 8, generator=generator),
        "sin": torch.randn(300, 8, generator=generator),
        "positions": torch.randint(0, 300, (count,), generator=generator),
        "rows": torch.randperm(200, generator=generator)[:count],
        "keys": pools[0],
        "values": pools[1],
        "eps": 1e-6,
    }


@needs_compiler
@pytest.mark.parametrize("count", [1, 3, 7, 130])
def test_context_rows_are_projected_normed_turned_and_stored_in_their_places(count):
    arguments = context_arguments(count)
    weight, bias = arguments.pop("plain")
    made = (arguments["features"] @ weight.T + bias).view(count, 2, 2, 3, 8)
    normed = torch.nn.functional.rms_norm(made[:, :, 0], (8,), None, 1e-6) * arguments["norms"]
    cos, sin = (arguments[name][arguments["positions"]][:, None, None] for name in ("cos", "sin"))
    keys, values = torch.zeros(2, 200, 3, 8), torch.zeros(2, 200, 3, 8)
    keys[:, arguments["rows"]] = apply_rope(normed, cos, sin).movedim(1, 0)
    values[:, arguments["rows"]] = made[:, :, 1].movedim(1, 0)
    draft_ops.store_context(**arguments)
    torch.testing.assert_close(arguments["keys"], keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(arguments["values"], values, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_context_rows_beyond_the_pool_or_the_positions_are_refused():
    arguments = context_arguments(2)
    del arguments["plain"]
    with pytest.raises(IndexError, match="row 200 of 200"):
        draft_ops.store_context(**arguments | {"rows": torch.tensor([0, 200])})
    with pytest.raises(IndexError, match="position 300"):
        draft_ops.store_context(**arguments | {"positions": torch.tensor([300, 0])})


@needs_compiler
def test_the_operators_of_a_cpus_drafter_pass_torchs_checks():
    arguments = choice_arguments(1, 2, 4, 3, has_ids=True)
    columns = [arguments[name] for name in ("anchors", "inverse_temperatures", "seeds", "firsts")]
    torch.library.opcheck(
        torch.ops.dflash_ray.choose_drafts.default,
        (arguments["rows"], list(arguments["weights"]), *columns, [4, 3, 4], [1e-6, 0.5, 3.0], True),
    )
    context = context_arguments(3)
    del context["plain"]
    torch.library.opcheck(torch.ops.dflash_ray.store_context.default, tuple(context.values()))
