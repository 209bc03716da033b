"""Trees of drafts are worth, and teach, what the paths in them are and do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_ray.router.speculation.acceptance import Acceptance
from dflash_ray.router.speculation.trees import (
    by_depth,
    depths_of,
    judged_nodes,
    survival_in_trees,
)

CHAIN = np.arange(5)[None]


@st.composite
def trees(draw) -> list[int]:
    return [draw(st.integers(0, node)) for node in range(draw(st.integers(1, 8)))]


def path_of(parents: list[int], node: int) -> list[int]:
    """Nodes from the first to `node`, which counts from 1."""
    return [*path_of(parents, parents[node - 1]), node] if node else []


@given(trees(), st.integers(0, 1 << 20))
def test_a_draft_is_worth_the_product_of_its_path_and_never_more_than_one_before_it(parents, seed):
    rates = np.random.default_rng(seed).random((1, len(parents)))
    paths = [path_of(parents, node + 1) for node in range(len(parents))]
    chances = [np.prod([rates[0, node - 1] for node in path]) for path in paths]
    survival = survival_in_trees(rates, np.array([parents]))[0]
    assert np.allclose(survival, np.minimum.accumulate(chances))
    assert depths_of(np.array([parents]))[0].tolist() == [len(path) - 1 for path in paths]


def test_what_hangs_on_the_accepted_path_is_judged():
    parents = np.array([[0, 0, 2, 2, 4], [0, 1, 2, 3, 4]])
    kept = np.array([[False, True, False, True, False], [True, False, False, False, False]])
    judged = judged_nodes(parents, np.array([5, 3]), kept)
    assert judged.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert by_depth(judged, depths_of(parents)).tolist()[0] == [True, True, True, False, False]


def test_a_chain_teaches_the_same_as_a_tree_of_one_path():
    models = [Acceptance(2, 5) for _ in range(2)]
    log_probs = np.log(np.array([[0.9, 0.5, 0.4, 0.3, 0.2]]))
    slots, counts = np.array([1]), np.array([4])
    models[0].saw_drafts(slots, counts, np.array([2]), log_probs)
    models[1].saw_trees(slots, counts, np.array([[True, True, False, False, False]]), log_probs, CHAIN)
    for survivals in (
        [model.survival(slots) for model in models],
        [model.survival_of(slots, log_probs) for model in models],
        [models[0].survival_of(slots, log_probs), models[1].survival_of(slots, log_probs, CHAIN)],
    ):
        assert np.allclose(*survivals)
    assert models[0].calibration_error == pytest.approx(models[1].calibration_error)
