"""Attention over pages on a device: what a row sees, and that nothing else changes its result by a bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.kernels import build, reference
from dflash_ray.kernels.attention import FEW_ROWS, SPLIT, HostAttention, PagedAttention, StepTables, plan
from dflash_ray.kernels.padded import PaddedStep
from dflash_ray.kernels.trees import depths_of, paths_of
from tests.unit.kernels.libraries import load_emulated
from tests.unit.kernels.test_forward import step
from tests.unit.kernels.test_trees import SHAPES, path_of, trees

CONTEXTS = st.one_of(st.integers(0, 40), st.sampled_from([SPLIT - 1, SPLIT, 2 * SPLIT + 3]))
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request):
    """Where a device's operator runs, and the operator."""
    if not build.is_loaded_for("cuda" if request.param == "cuda" else "cpu"):
        pytest.skip("no compiler: operators run in plain torch here")
    if request.param == "cuda":
        return "cuda", torch.ops.dflash_ray.attend_pages
    load_emulated()
    return "cpu", torch.ops.dflash_ray_emulated.attend_pages


def attend(device, arguments, parents, **kind):
    """Arguments as `test_forward.step` makes them; returns what all rows attended to, and the caches."""
    name, operator = device
    query, key, value, keys, values, slots, *tables, page_size = (
        each.clone().to(name) if isinstance(each, torch.Tensor) else each for each in arguments
    )
    columns = StepTables(*(table.cpu().numpy() for table in tables), np.array(parents, dtype=np.int64))
    planned = PagedAttention(columns, slots, page_size, operator)
    return planned.attend(query, key, value, keys, values, **kind).cpu(), (keys.cpu(), values.cpu())


@given(
    forest=st.lists(st.tuples(trees(), CONTEXTS), min_size=1, max_size=3),
    is_causal=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    **SHAPES,
)
@settings(deadline=None, max_examples=40)
def test_rows_attend_to_what_they_see(device, forest, is_causal, dtype, kv_heads, group, size, window, softcap):
    entries = [(len(parents), context) for parents, context in forest]
    arguments = [
        each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in step(entries, kv_heads * group, kv_heads, size)
    ]
    parents = [parent for tree, _ in forest for parent in tree] if is_causal else []
    exact = [each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
             for each in arguments]  # fmt: skip
    kind = {"scale": size**-0.5, "window": window, "softcap": softcap, "is_causal": is_causal}
    want = reference.paged_attention(*exact, **kind, parents=torch.tensor(parents) if parents else None)
    got, caches = attend(device, arguments, parents, **kind)
    assert torch.allclose(got.double(), want, atol=DTYPES[dtype], rtol=DTYPES[dtype])
    assert torch.equal(caches[0].double(), exact[3]) and torch.equal(caches[1].double(), exact[4])


@given(tree=trees(), context=CONTEXTS, neighbour=trees(), **SHAPES)
@settings(deadline=None, max_examples=20)
def test_a_row_is_to_the_bit_the_row_of_a_chain_without_neighbours(
    device, tree, context, neighbour, kv_heads, group, size, window, softcap
):
    entries = [(len(tree), context), (len(neighbour), 3)]
    query, key, value, *caches, slots, lens, contexts, counts, pages, page_size = step(
        entries, kv_heads * group, kv_heads, size
    )
    kind = {"scale": size**-0.5, "window": window, "softcap": softcap}
    whole = (query, key, value, *caches, slots, lens, contexts, counts, pages, page_size)
    got, _ = attend(device, whole, [*tree, *neighbour], **kind)
    for row in range(len(tree)):
        path = torch.tensor(path_of(tree, row))
        chain = (
            query[path], key[path], value[path], *caches, slots[: len(path)], torch.tensor([len(path)]), contexts[:1],
            counts[:1], pages[: counts[0]], page_size,
        )  # fmt: skip
        alone, _ = attend(device, chain, [], **kind)
        assert torch.equal(got[row], alone[-1])


def test_rows_of_a_prompt_beside_others_change_nothing_for_these(device):
    arguments = step([(3, 20), (FEW_ROWS + 5, 8), (1, 0)], 4, 2, 16)
    want = reference.paged_attention(*(each.clone() if isinstance(each, torch.Tensor) else each for each in arguments),
                                     scale=0.25, window=0, softcap=0.0, is_causal=True)  # fmt: skip
    got, _ = attend(device, arguments, [], scale=0.25)
    assert torch.allclose(got, want, atol=1e-5)
    query, key, value, *caches, slots, lens, contexts, counts, pages, page_size = arguments
    alone, _ = attend(
        device,
        (query[:3], key[:3], value[:3], *caches, slots[:3], lens[:1], contexts[:1], counts[:1], pages[: counts[0]],
         page_size),
        [],
        scale=0.25,
    )  # fmt: skip
    assert torch.equal(got[:3], alone)


def test_a_step_is_planned_for_the_device_of_its_slots(monkeypatch):
    *_, slots, lens, contexts, counts, pages, page_size = step([(3, 20)], 4, 2, 16)
    tables = StepTables(*(each.numpy() for each in (lens, contexts, counts, pages)), np.zeros(0, dtype=np.int64))
    assert isinstance(plan(tables, slots, page_size), HostAttention)
    monkeypatch.setattr(build, "is_loaded_for", lambda device: False)
    assert isinstance(plan(tables, slots.to("meta"), page_size), PaddedStep)


@given(trees(max_rows=12), trees(max_rows=5))
def test_paths_lead_from_an_entrys_first_row_to_every_row(first, second):
    parents = np.array([*first, *second])
    firsts = np.array([0] * len(first) + [len(first)] * len(second))
    depths = depths_of(parents, firsts)
    paths = paths_of(parents, firsts, depths)
    want = [*(path_of(first, row) for row in range(len(first))), *(path_of(second, row) for row in range(len(second)))]
    assert [path[: depth + 1].tolist() for path, depth in zip(paths, depths, strict=True)] == want


@pytest.mark.skipif(not build.is_loaded_for("cpu"), reason="no C++ compiler: operators run in plain torch here")
def test_the_operator_passes_torchs_checks():
    load_emulated()
    query, key, value, *caches, slots, _, _, _, pages, page_size = step([(2, 9)], 4, 2, 16)
    lines = torch.tensor([[0, 9, 9, 11, 0, 0], [1, 9, 10, 11, 0, 0]])
    arguments = (query, key, value, *caches, slots, lines, pages, None, page_size, 1, 0.25, 0, 0.0, True)
    torch.library.opcheck(torch.ops.dflash_ray_emulated.attend_pages.default, arguments)
    with pytest.raises(RuntimeError, match="heads of 16 values, 3 on 2"):
        torch.ops.dflash_ray_emulated.attend_pages(query[:, :3], *arguments[1:])
