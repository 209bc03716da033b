"""From a block's last rows to its drafts: head, candidates, and for DFlash 2 the selector and its walk.

On every device the same functions; nothing waits for the device, and no shape depends on what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.core.arrays import Ints
from dflash_ray.kernels import draft_ops
from dflash_ray.models.dflash import DflashNetwork
from dflash_ray.models.dflash2 import CandidateSelector, Draw
from dflash_ray.models.packed_linear import PackedLinear


class DrawColumns(NamedTuple):
    """How the tokens of N blocks are drawn, [N].

    Attributes:
        inverse_temperatures: float64; 0 is greedy.
        seeds: int64, the bits of unsigned numbers.
        firsts: int64 positions of the first drafts.
    """

    inverse_temperatures: Tensor
    seeds: Tensor
    firsts: Tensor


class Choice(NamedTuple):
    """What is proposed for S slots of N blocks, with k candidates each.

    Attributes:
        ids: int64 [N, S, k] of the target's vocabulary; the chosen one comes first, the others by falling probability.
        log_probs: float32 [N, S, k].
        candidates: of a selector the ids as it had them, ascending; else empty.
        scores: of a selector float32 [N, S, k, k], after each candidate of the slot before; else empty.
    """

    ids: Tensor
    log_probs: Tensor
    candidates: Tensor
    scores: Tensor


def draw_values(draws: Sequence[Draw]) -> tuple[NDArray[np.float64], Ints]:
    """Inverse temperatures and seeds as `DrawColumns` has them."""
    inverse = np.array([draw.temperature and 1 / draw.temperature for draw in draws], dtype=np.float64)
    return inverse, np.array([draw.seed for draw in draws], dtype=np.uint64).view(np.int64)


class DraftChooser:
    """Chooses drafts with a head for the tokens `ids` int64 [V_d], ascending (None: the target's own)."""

    def __init__(
        self, network: DflashNetwork, head: PackedLinear, selector: CandidateSelector | None, ids: Tensor | None
    ) -> None:
        self._network, self.head, self.selector, self.ids = network, head, selector, ids

    @property
    def draws(self) -> bool:
        """Whether it looks at how tokens are drawn."""
        return self.selector is not None

    def num_candidates(self, wanted: int) -> int:
        """Candidates of a slot, of which at least so many are wanted."""
        return min(wanted, self.head.out_features) if self.selector is None else self.selector.top_k

    def __call__(self, hidden: Tensor, anchors: Tensor, draws: DrawColumns | None, num_candidates: int) -> Choice:
        """Drafts of slots whose rows are hidden [N, S, H] behind anchors int64 [N]; draws are a selector's."""
        logits = self._network.shape_logits(self.head(hidden).float())
        if self.selector is None or draws is None:
            best, at = logits.topk(num_candidates, dim=-1)
            return Choice(
                self._tokens(at), best - logits.logsumexp(dim=-1, keepdim=True), at.new_empty(0), best.new_empty(0)
            )
        rows, scores = self.selector(hidden, logits, self._numbers(anchors))
        candidates = self._tokens(rows)
        ids, log_probs = draft_ops.walk_candidates(scores, candidates, *draws)
        return Choice(ids, log_probs, candidates, scores)

    def _tokens(self, rows: Tensor) -> Tensor:
        return rows if self.ids is None else self.ids[rows]

    def _numbers(self, anchors: Tensor) -> Tensor:
        """Anchors as the selector numbers tokens, like the head; one without a row counts as the row before it."""
        if self.ids is None:
            return anchors
        return (torch.searchsorted(self.ids, anchors, right=True) - 1).clamp(min=0)
