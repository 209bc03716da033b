"""Trees of drafts for tests of the engine."""

from __future__ import annotations

import random
from typing import Any

from tests.steps import VOCAB


def random_tree(rng: random.Random, coming: list[int], most: int = 12) -> tuple[list[int], list[int]]:
    """Tokens and parents of a random tree, in which the tokens that come are often somewhere on a path."""
    tokens: list[int] = []
    parents: list[int] = []
    depths = [0]
    for node in range(rng.randint(0, most)):
        parent = rng.randint(0, node) if rng.random() < 0.6 else node
        depth = depths[parent]
        is_right = depth < len(coming) and rng.random() < 0.6
        parents.append(parent)
        tokens.append(coming[depth] if is_right else rng.randrange(VOCAB))
        depths.append(depth + 1)
    return tokens, parents


def random_trees(truth: list[int], prompt_len: int, seed: int = 0) -> Any:
    """What `steps.run` takes: a tree for each step of an answer that is known."""
    rng = random.Random(seed)
    return lambda tokens: random_tree(rng, truth[len(tokens) - prompt_len :])
