"""Trees with branches hold the likeliest paths of drafter and n-grams together, each of them once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.core import ngram_branches
from dflash_ray.core.ngram import IndexingRoom, NgramTable
from dflash_ray.core.ngram_branches import Trees, with_branches
from tests.unit.core.test_ngram import search

Path = tuple[int, ...]


def paths_of(trees: Trees, place: int) -> list[Path]:
    """The tokens from the anchor to each node."""
    paths: list[Path] = [()]
    for node in range(int(trees.counts[place])):
        parent = int(trees.parents[place, node])
        assert parent <= node, "a parent comes before its children"
        paths.append((*paths[parent], int(trees.tokens[place, node])))
    return paths[1:]


def totals_of(trees: Trees, place: int) -> list[float]:
    """The log-probabilities of the nodes' paths."""
    totals = [0.0]
    for node in range(int(trees.counts[place])):
        totals.append(totals[int(trees.parents[place, node])] + float(trees.log_probs[place, node]))
    return totals[1:]


def branched(texts: list[list[int]], trees: Trees, most: list[int]) -> Trees:
    tokens = np.zeros((len(texts) + 1, 80), np.uint32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    table = NgramTable(tokens)
    rows, lens = np.arange(len(texts)), np.array([len(text) for text in texts])
    table.catch_up(rows, lens, IndexingRoom(10**9))
    return with_branches(trees, np.array(most), table, rows, lens)


def trees_of(paths: list[dict[Path, float]]) -> Trees:
    """Trees of paths whose last tokens have these chances given those before."""
    size = len(paths), max(map(len, paths))
    trees = Trees(np.zeros(size, np.uint32), np.zeros(size, np.int64), np.zeros(size), np.array([*map(len, paths)]))
    for place, of_tree in enumerate(paths):
        numbers: dict[Path, int] = {(): 0}
        for node, (path, chance) in enumerate(of_tree.items()):
            numbers[path] = node + 1
            trees.tokens[place, node], trees.parents[place, node] = path[-1], numbers[path[:-1]]
            trees.log_probs[place, node] = np.log(chance)
    return trees


def by_hand(text: list[int], tree: dict[Path, float]) -> dict[Path, float]:
    """The chance of every path that a tree with branches may hold."""
    rates, chances = ngram_branches._CHANCES, {(): 1.0}
    branches = {path: search(text, [*text, *path], ngram_branches._LONGEST) for path in [(), *tree]}
    for path, said in tree.items():
        branch = branches[path[:-1]]
        rate = float(rates[branch.match_len]) if branch.tokens else 0.0
        has_it = branch.tokens[:1] == [path[-1]]
        chances[path] = chances[path[:-1]] * (said * (1 - rate) + rate * has_it)
    for path, branch in branches.items():
        if branch.tokens and (*path, branch.tokens[0]) not in tree:
            for ahead, token in enumerate(branch.tokens):
                rate = float(rates[min(branch.match_len + ahead, len(rates) - 1)])
                chances[(*path, token)] = chances[path] * rate
                path = (*path, token)
    del chances[()]
    return chances


@st.composite
def drafted(draw: Any) -> tuple[list[int], dict[Path, float]]:
    """A text with few distinct tokens, and a tree behind it."""
    text = draw(st.lists(st.integers(1, 4), min_size=1, max_size=40))
    chances: dict[Path, float] = {}
    tree: dict[Path, float] = {}
    for _ in range(draw(st.integers(1, 10))):
        above = draw(st.sampled_from([(), *tree]))
        path = (*above, draw(st.integers(1, 6)))
        if path not in tree:
            left = 1.0 - sum(chance for other, chance in tree.items() if other[:-1] == above)
            tree[path] = left * draw(st.floats(0.1, 0.9))
            chances[path] = chances.get(above, 1.0) * tree[path]
    return text, dict(sorted(tree.items(), key=lambda one: -chances[one[0]]))


@settings(max_examples=300)
@given(st.lists(st.tuples(drafted(), st.integers(1, 24)), min_size=1, max_size=3))
def test_the_likeliest_paths_of_drafter_and_ngrams_are_held_once_by_falling_chance(cases):
    texts, trees = [text for (text, _), _ in cases], [tree for (_, tree), _ in cases]
    found = branched(texts, trees_of(trees), [most for _, most in cases])
    for place, ((text, tree), most) in enumerate(cases):
        wanted = by_hand(text, tree)
        paths, totals = paths_of(found, place), totals_of(found, place)
        assert len(set(paths)) == len(paths) == min(most, len(wanted))
        assert np.allclose(np.exp(totals), [wanted[path] for path in paths])
        assert np.allclose(np.exp(totals), sorted(wanted.values(), reverse=True)[:most])


def test_a_text_without_repetitions_leaves_a_tree_as_it_is():
    trees = trees_of([{(7,): 0.6, (8,): 0.3, (7, 9): 0.2}])
    found = branched([[1, 2, 3, 4, 5]], trees, [7])
    assert paths_of(found, 0) == [(7,), (8,), (7, 9)]
    assert np.exp(found.log_probs[0, :3]) == pytest.approx([0.6, 0.3, 0.2])


def test_a_chain_is_kept_beside_the_branch_of_a_repeated_text():
    text = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    found = branched([text], trees_of([{(7,): 0.9, (7, 8): 0.9}]), [7])
    paths = paths_of(found, 0)
    assert {(7,), (7, 8), (4,), (4, 5), (4, 5, 6)} <= set(paths)
    assert paths[0] == (4,)


def test_a_node_that_the_text_goes_on_with_is_likelier_and_not_there_twice():
    text = [1, 2, 3, 4, 5, 9, 1, 2, 3]
    found = branched([text], trees_of([{(4,): 0.5, (6,): 0.4}]), [2])
    assert paths_of(found, 0) == [(4,), (4, 5)]
    assert np.exp(found.log_probs[0, 0]) > 0.5
