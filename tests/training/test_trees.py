"""Best-first trees hold the likeliest paths, and more nodes never accept less."""

from itertools import product

import hypothesis.strategies as st
import numpy as np
from hypothesis import given
from hypothesis.extra.numpy import arrays

from dflash_ray.training.trees import accepted_depth, best_first_tree

SCORES = arrays(np.float32, (3, 3), elements=st.floats(-4, 0, width=32))


def best_first(scores: np.ndarray) -> np.ndarray:
    return -np.sort(-scores, axis=1)


@given(SCORES, st.integers(1, 12))
def test_the_tree_holds_the_likeliest_paths_and_their_beginnings(scores, num_nodes):
    logprobs = best_first(scores)
    tree = best_first_tree(logprobs, num_nodes)
    paths = [path for depth in (1, 2, 3) for path in product(range(3), repeat=depth)]
    chance = {path: sum(float(logprobs[slot, rank]) for slot, rank in enumerate(path)) for path in paths}
    assert len(tree) == num_nodes
    assert all(path[:-1] in tree for path in tree if len(path) > 1)
    rest = [chance[path] for path in paths if path not in tree]
    assert min(chance[path] for path in tree) >= max(rest) - 1e-5


@given(SCORES, st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_a_larger_tree_accepts_no_less(scores, truth):
    ids = np.arange(9).reshape(3, 3) % 5
    logprobs = best_first(scores)
    depths = [accepted_depth(best_first_tree(logprobs, n), ids, truth) for n in (1, 3, 7, 15, 39)]
    assert depths == sorted(depths)


def test_a_chain_is_the_tree_of_sure_slots():
    logprobs = np.log(np.array([[0.99, 0.01]] * 4, dtype=np.float32))
    assert best_first_tree(logprobs, 4) == {(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)}
    ids = np.array([[1, 9], [2, 9], [3, 9], [4, 9]])
    assert accepted_depth(best_first_tree(logprobs, 4), ids, [1, 2, 7]) == 2
    assert accepted_depth(best_first_tree(logprobs, 8), ids, [1, 9, 3]) >= 2
