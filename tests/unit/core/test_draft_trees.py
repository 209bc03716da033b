"""Trees hold the likeliest paths with their beginnings, by falling chance."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given
from hypothesis.extra.numpy import arrays

from dflash_ray.core.draft_trees import likeliest_trees
from dflash_ray.training.trees import best_first_tree

SCORES = arrays(np.float64, (2, 3, 3, 3), elements=st.floats(-4, 0))


def paths_of(trees, block: int) -> list[tuple[int, ...]]:
    """The candidates of each node's path."""
    paths: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(trees.parents[block].tolist()):
        assert parent <= node and len(paths[parent]) == trees.slots[block, node]
        paths.append((*paths[parent], int(trees.candidates[block, node])))
    return paths[1:]


def chance_of(scores, path: tuple[int, ...]) -> float:
    previous = (0, *path)
    return sum(scores[slot, previous[slot], candidate] for slot, candidate in enumerate(path))


@given(SCORES, st.integers(1, 12))
def test_a_tree_holds_the_likeliest_paths_of_candidates_that_depend_on_each_other(scores, num_nodes):
    trees = likeliest_trees(scores, num_nodes, 3)
    every = [path for n in (1, 2, 3) for path in np.ndindex(*(3,) * n)]
    for block in range(2):
        paths = paths_of(trees, block)
        assert len(paths) == len(set(paths)) == num_nodes
        chances = [chance_of(scores[block], path) for path in paths]
        assert chances == sorted(chances, reverse=True)
        assert min(chances) >= max(chance_of(scores[block], path) for path in every if path not in paths) - 1e-9
        own = [chance_of(scores[block], path) - chance_of(scores[block], path[:-1]) for path in paths]
        assert np.allclose(trees.log_probs[block], own)


@given(arrays(np.float32, (1, 3, 1, 3), elements=st.floats(-4, 0, width=32), unique=True), st.integers(1, 12))
def test_trees_of_independent_slots_are_the_best_first_ones(scores, num_nodes):
    scores = -np.sort(-scores, axis=-1)
    paths = paths_of(likeliest_trees(scores.astype(np.float64), num_nodes, 3), 0)
    best = best_first_tree(scores[0, :, 0], num_nodes)
    assert np.isclose(
        sorted(chance_of_slots(scores, path) for path in paths), sorted(chance_of_slots(scores, path) for path in best)
    ).all()


def chance_of_slots(scores, path) -> float:
    return sum(float(scores[0, slot, 0, candidate]) for slot, candidate in enumerate(path))


def test_a_tree_of_width_one_is_the_chain_of_the_best_candidates_each_after_the_one_before():
    scores = np.log(np.array([[[[0.1, 0.9], [0.5, 0.5]], [[0.7, 0.3], [0.2, 0.8]], [[0.6, 0.4], [0.9, 0.1]]]]))
    trees = likeliest_trees(scores, 5, 1)
    assert trees.parents.tolist() == [[0, 1, 2]]
    assert trees.candidates.tolist() == [[1, 1, 0]]
