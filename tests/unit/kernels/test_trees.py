"""Attention of rows that branch: a row's result is the one that it has in a chain of what it follows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.kernels import build, ops, reference
from dflash_ray.kernels.trees import depths_of
from tests.unit.kernels.test_forward import normal, step

needs_compiler = pytest.mark.skipif(
    not build.is_loaded_for("cpu"), reason="no C++ compiler: operators run in plain torch here"
)


@st.composite
def trees(draw, max_rows: int = 9) -> list[int]:
    """Parents of an entry's rows."""
    return [-1, *(draw(st.integers(0, row)) for row in range(draw(st.integers(0, max_rows - 1))))]


def path_of(parents: list[int], row: int) -> list[int]:
    return [*path_of(parents, parents[row]), row] if row >= 0 else []


SHAPES = {
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 4),
    "size": st.sampled_from([1, 8, 20, 64]),
    "window": st.sampled_from([0, 1, 7, 1000]),
    "softcap": st.sampled_from([0.0, 5.0]),
}


@needs_compiler
@given(forest=st.lists(st.tuples(trees(), st.integers(0, 40)), min_size=1, max_size=4), **SHAPES)
@settings(deadline=None, max_examples=100)
def test_attention_in_trees_equals_torch(forest, kv_heads, group, size, window, softcap):
    arguments = step([(len(parents), context) for parents, context in forest], kv_heads * group, kv_heads, size)
    parents = torch.tensor([parent for tree, _ in forest for parent in tree])
    copies = [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]
    kind = {"scale": size**-0.5, "window": window, "softcap": softcap, "is_causal": True}
    got = ops.paged_attention(*arguments, **kind, parents=parents)
    want = reference.paged_attention(*copies, **kind, parents=parents)
    assert torch.allclose(got, want, atol=1e-5)
    assert all(torch.equal(arguments[cache], copies[cache]) for cache in (3, 4)), "the caches hold the new rows"


@needs_compiler
@given(tree=trees(), context=st.integers(0, 40), neighbour=trees(), **SHAPES)
@settings(deadline=None, max_examples=60)
def test_a_row_of_a_tree_is_to_the_bit_the_row_of_the_chain_that_it_follows(
    tree, context, neighbour, kv_heads, group, size, window, softcap
):
    entries = [(len(tree), context), (len(neighbour), 3)]
    query, key, value, *caches, slots, lens, contexts, counts, pages, page_size = step(
        entries, kv_heads * group, kv_heads, size
    )
    kind = {"page_size": page_size, "scale": size**-0.5, "window": window, "softcap": softcap}
    got = ops.paged_attention(
        query, key, value, *(cache.clone() for cache in caches), slots, lens, contexts, counts, pages, **kind,
        parents=torch.tensor([*tree, *neighbour]),
    )  # fmt: skip
    for row in range(len(tree)):
        path = torch.tensor(path_of(tree, row))
        chain = ops.paged_attention(
            query[path], key[path], value[path], *(cache.clone() for cache in caches), slots[: len(path)],
            torch.tensor([len(path)]), contexts[:1], counts[:1], pages[: counts[0]], **kind,
        )  # fmt: skip
        assert torch.equal(got[row], chain[-1])


@given(trees(max_rows=12))
def test_depths_are_those_of_the_paths(parents):
    column = np.array(parents)
    assert depths_of(column, np.zeros_like(column)).tolist() == [
        len(path_of(parents, row)) - 1 for row in range(len(parents))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_move_to_earlier_places_in_all_caches_without_overwriting_what_still_moves(dtype):
    caches = [normal(8, 2, 3, seed=seed).to(dtype) for seed in range(3)]
    before = [cache.clone() for cache in caches]
    ops.move_rows(caches, torch.tensor([3, 5, 7]), torch.tensor([2, 3, 5]))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old[[0, 1, 3, 5, 4, 7, 6, 7]])
