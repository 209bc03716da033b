"""Attention over pages on a device: what a row sees, and that nothing else changes its result by a bit."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.kernels import build, reference
from dflash_ray.kernels.attention import (
    FEW_ROWS,
    SPLIT,
    HostAttention,
    PagedAttention,
    PlanMemory,
    Room,
    StepTables,
    plan,
    plan_within,
)
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
    planned = PagedAttention.of_step(columns, slots, page_size, operator)
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


def rows_of(arguments, entries, chosen, begin, end):
    """Arguments of a step of rows begin to end of one entry alone, whose earlier rows are in the cache."""
    query, key, value, *caches, slots, lens, contexts, counts, pages, page_size = arguments
    first, page = int(lens[:chosen].sum()), int(counts[:chosen].sum())
    at = slice(first + begin, first + end)
    return (
        query[at], key[at], value[at], *caches, slots[at], torch.tensor([end - begin]),
        contexts[chosen : chosen + 1] + begin, counts[chosen : chosen + 1], pages[page : page + counts[chosen]],
        page_size,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "softcap", "is_causal"), [(0, 0.0, True), (100, 5.0, True), (0, 0.0, False), (50, 0.0, False)]
)
def test_rows_of_a_prompt_are_the_same_to_the_bit_however_it_is_cut(device, dtype, window, softcap, is_causal):
    entries = [(3, 20), (SPLIT + FEW_ROWS, 230), (1, 0)]
    arguments = tuple(
        each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in step(entries, 4, 2, 16)
    )
    kind = {"scale": 0.25, "window": window, "softcap": softcap, "is_causal": is_causal}
    whole, caches = attend(device, arguments, [], **kind)
    exact = [each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
             for each in arguments]  # fmt: skip
    want = reference.paged_attention(*exact, *kind.values())
    assert torch.allclose(whole.double(), want, atol=DTYPES[dtype], rtol=DTYPES[dtype])
    num_rows = entries[1][0]
    # Rows that see those behind them cannot be cut off from these.
    cuts = [0, 1, 17, 33, 40, 200, num_rows] if is_causal else [0, num_rows]
    stored = (*arguments[:3], *caches, *arguments[5:])
    for begin, end in itertools.pairwise(cuts):
        alone, _ = attend(device, rows_of(stored, entries, 1, begin, end), [], **kind)
        assert torch.equal(alone, whole[3 + begin : 3 + end])
    few, _ = attend(device, rows_of(stored, entries, 0, 0, 3), [], **kind)
    assert torch.equal(few, whole[:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "size"), [(1, 128), (5, 96), (12, 40), (2, 256), (9, 130)])
def test_heads_of_all_sizes_and_numbers_attend(device, dtype, group, size):
    arguments = [
        each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each
        for each in step([(18, 40), (2, 300)], group, 1, size)
    ]
    exact = [each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each
             for each in arguments]  # fmt: skip
    want = reference.paged_attention(*exact, size**-0.5, 0, 0.0, True)
    got, _ = attend(device, arguments, [], scale=size**-0.5)
    assert torch.allclose(got.double(), want, atol=DTYPES[dtype], rtol=DTYPES[dtype])


def memory_of(room: Room, device: str = "cpu") -> PlanMemory:
    return PlanMemory(np.full(room.size, -7), torch.empty(room.size, dtype=torch.int64, device=device))


def test_a_plan_with_room_attends_to_every_step_as_that_steps_own_plan(device):
    name, operator = device
    room = Room(rows=24, entries=4, pages=200, max_len=2 * SPLIT, depth=5)
    slots = torch.zeros(room.rows, dtype=torch.int64, device=name)
    memory = memory_of(room, name)
    planned = PagedAttention(room, slots, 4, operator, memory)
    steps = [
        ([(3, 300), (17, 8)], []),
        ([(4, 20), (1, 0), (2, 9)], [-1, 0, 0, 1, -1, -1, 0]),
        ([(4, 20), (17, 9)], [-1, 0, 0, 1, *range(-1, 16)]),
        ([(1, SPLIT - 1)], []),
        ([], []),
    ]
    for entries, parents in steps:
        arguments = step(entries, 4, 2, 16) if entries else (*step([(1, 0)], 4, 2, 16)[:5], *no_tables(), 4)
        query, _, _, keys, values, own_slots, *tables, _ = arguments
        num_rows = len(own_slots)
        slots[:num_rows] = own_slots.to(name)
        used = planned.refill(StepTables(*(table.numpy() for table in tables), np.array(parents, dtype=np.int64)))
        memory.device[:used] = torch.from_numpy(memory.host[:used]).to(name)
        padded = torch.cat([query[:num_rows], torch.full((room.rows - num_rows, *query.shape[1:]), torch.nan)]).to(name)
        got = planned.attend(padded, None, None, keys.to(name), values.to(name), scale=0.25).cpu()
        assert not got[num_rows:].any()
        if num_rows:
            at = own_slots
            want, _ = attend(device, (query, keys[at], values[at], *arguments[3:]), parents, scale=0.25)
            assert torch.equal(got[:num_rows], want)


def no_tables():
    """Slots and tables of a step of no entry."""
    return (torch.zeros(0, dtype=torch.int64) for _ in range(5))


def test_a_step_larger_than_its_room_is_refused():
    room, slots = Room(4, 2, 8, 40, 2), torch.zeros(4, dtype=torch.int64)
    planned = PagedAttention(room, slots, 4, None, memory_of(room))

    def refill(lens, contexts, parents=()):
        counts = [-(-(own + context) // 4) for own, context in zip(lens, contexts, strict=True)]
        columns = (lens, contexts, counts, [0] * sum(counts), parents)
        planned.refill(StepTables(*(np.array(column, dtype=np.int64) for column in columns)))

    refill([2, 2], [3, 0])
    for lens, contexts, parents in (([5], [0], ()), ([1, 1, 1], [0] * 3, ()), ([2, 2], [20, 13], ())):
        with pytest.raises(ValueError, match="a step of"):
            refill(lens, contexts, parents)
    room = room._replace(pages=800)
    planned = PagedAttention(room, slots, 4, None, memory_of(room))
    with pytest.raises(ValueError, match="a context of 41 rows"):
        refill([1], [40])
    with pytest.raises(ValueError, match="a tree of depth 3"):
        refill([4], [0], [-1, 0, 1, 0])


def test_on_the_host_rows_behind_all_entries_attend_to_nothing():
    query, key, value, *caches, slots, lens, contexts, counts, pages, page_size = step([(3, 20)], 4, 2, 16)
    tables = StepTables(*(each.numpy() for each in (lens, contexts, counts, pages)), np.zeros(0, dtype=np.int64))
    room = Room(5, 1, 6, 23)
    planned = plan_within(room, torch.cat([slots, slots[:2]]), page_size, memory_of(room))
    planned.refill(tables)
    caches[0][slots], caches[1][slots] = key, value
    got = planned.attend(torch.cat([query, query[:2]]), None, None, *caches, 0.25)
    want = plan(tables, slots, page_size).attend(query, key, value, *caches, 0.25)
    assert torch.equal(got[:3], want) and not got[3:].any()


def test_a_step_is_planned_for_the_device_of_its_slots(monkeypatch):
    *_, slots, lens, contexts, counts, pages, page_size = step([(3, 20)], 4, 2, 16)
    tables = StepTables(*(each.numpy() for each in (lens, contexts, counts, pages)), np.zeros(0, dtype=np.int64))
    assert isinstance(plan(tables, slots, page_size), HostAttention)
    monkeypatch.setattr(build, "is_loaded_for", lambda device: False)
    assert isinstance(plan(tables, slots.to("meta"), page_size), HostAttention)


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
    rows, tiles = torch.tensor([[9, 11, 0, 1], [10, 11, 1, 1]]), torch.tensor([[0, 9, 0, 0, 2, 1, 0]])
    arguments = (query, key, value, *caches, slots, rows, tiles, pages, None, page_size, 1, 2, 0.25, 0, 0.0, True)
    torch.library.opcheck(torch.ops.dflash_ray_emulated.attend_pages.default, arguments)
    with pytest.raises(RuntimeError, match="heads of 16 values, 3 on 2"):
        torch.ops.dflash_ray_emulated.attend_pages(query[:, :3], *arguments[1:])
