"""What followed earlier occurrences of a sequence's text, as branches of its trees of drafts.

Behind the anchor and behind every node of a tree the last tokens are looked up (`core/ngram.py`). What followed them is
likely to follow again, by the length of the match, so a node's children come from a mixture: with that chance the token
that followed, else what the drafter says. Tokens that no child has become nodes, and the text behind them their branch.
Needs tokens alone, so it is done wherever they are known.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core.arrays import Ints, Tokens
from dflash_ray.core.ngram import MAX_NGRAM, NgramTable

Floats = NDArray[np.floating[Any]]
_Value = TypeVar("_Value", bound=np.generic)

# By the length of a match: the chance that its text goes on the same way and the drafter has no say in it. Fitted by
# expectation-maximisation to the second halves of the categories of benchmarks/drafter_prompts.jsonl, greedy; of 4
# tokens it gave 0.55, which count as much as 3 do.
_CHANCES = np.array([0.0, 0.0, 0.41, 0.57, 0.57, 0.79])
_LOG_CHANCES = np.log(np.maximum(_CHANCES, 1e-9))
_LONGEST = 8  # nodes of a branch
_LEAST = 1e-30  # in place of a chance of nothing


class Trees(NamedTuple):
    """Trees of N sequences by falling chance, [N, k]; of each the first `counts` nodes.

    Attributes:
        tokens: of the nodes.
        parents: 0 is the anchor, j the j-th node; a parent comes before its children.
        log_probs: of a node, given that its parent is right.
        counts: [N].
    """

    tokens: Tokens
    parents: Ints
    log_probs: Floats
    counts: Ints


def with_branches(trees: Trees, most: Ints, ngrams: NgramTable, rows: Ints, lens: Ints) -> Trees:
    """The likeliest `most` [N] nodes of the trees and of the branches that n-grams add to them.

    Args:
        rows, lens: [N] of the sequences in `ngrams`, which has caught up with them, and their committed tokens; the
            last one is the anchor.
    """
    num_nodes = trees.tokens.shape[1]
    blocks = np.arange(len(lens))[:, None]
    is_node = np.arange(num_nodes) < trees.counts[:, None]
    above = np.where(is_node, trees.parents, 0)
    branches, found, match_lens = ngrams.propose_behind(rows, lens, trees.tokens, above, _LONGEST)
    if not branches.shape[2]:
        return trees._replace(counts=np.minimum(trees.counts, most))
    chances = np.where(found > 0, _CHANCES[match_lens], 0.0)
    # A node gets what its parent's branch says, if it begins with it, and of what the drafter says the rest.
    follows = is_node & (found[blocks, above] > 0) & (trees.tokens == branches[blocks, above, 0])
    said = np.exp(np.minimum(trees.log_probs, 0.0)) * (1.0 - chances[blocks, above])
    own = np.where(is_node, np.log(said + follows * chances[blocks, above] + _LEAST), -np.inf)
    totals = _path_sums(own, above)
    # Behind a node that a branch begins with, the node's own branch goes on.
    found[np.nonzero(follows)[0], above[follows]] = 0
    ahead = np.arange(branches.shape[2])
    rates = np.where(
        ahead < found[:, :, None], _LOG_CHANCES[np.minimum(match_lens[:, :, None] + ahead, MAX_NGRAM)], -np.inf
    )
    roots = np.concatenate((np.zeros((len(lens), 1)), totals), axis=1)
    new_totals = roots[:, :, None] + np.cumsum(rates, axis=2)
    # Places in what is joined here begin at 1; a branch's first node hangs on a node, the others on the one before.
    places = num_nodes + np.arange(new_totals[0].size).reshape(new_totals[0].shape)
    places[:, 0] = np.arange(num_nodes + 1)
    hangs_on = np.broadcast_to(places, new_totals.shape)
    joined = Trees(
        _joined(trees.tokens, branches), _joined(above, hangs_on), _joined(own, rates), np.zeros(len(lens), np.int64)
    )
    return _likeliest(joined, _joined(totals, new_totals), most)


def _joined(nodes: NDArray[_Value], branches: NDArray[_Value]) -> NDArray[_Value]:
    """[N, k] of nodes, and behind them [N, roots, length] of branches."""
    return np.concatenate((nodes, branches.reshape(len(branches), -1)), axis=1)


def _path_sums(values: Floats, parents: Ints) -> Floats:
    """[N, k]: of each node's value and those of all that it follows. A path is summed in halves."""
    sums = np.concatenate((np.zeros((len(values), 1)), values), axis=1)
    above = np.concatenate((np.zeros((len(values), 1), np.int64), parents), axis=1)
    for _ in range(values.shape[1].bit_length()):
        sums = sums + np.take_along_axis(sums, above, axis=1)
        above = np.take_along_axis(above, above, axis=1)
    return sums[:, 1:]


def _likeliest(nodes: Trees, totals: Floats, most: Ints) -> Trees:
    """The likeliest `most` of each; of those as likely the first ones, so parents come before their children."""
    order = np.argsort(-totals, axis=1, kind="stable")[:, : int(most.max(initial=0))]
    ranks = np.zeros((len(totals), totals.shape[1] + 1), np.int64)
    np.put_along_axis(ranks, order + 1, np.arange(1, order.shape[1] + 1)[None], axis=1)
    parents = np.take_along_axis(ranks, np.take_along_axis(nodes.parents, order, axis=1), axis=1)
    tokens: Tokens = np.take_along_axis(nodes.tokens, order, axis=1)
    log_probs: Floats = np.take_along_axis(nodes.log_probs, order, axis=1)
    return Trees(tokens, parents, log_probs, np.minimum(most, np.count_nonzero(totals > -np.inf, axis=1)))
