"""A drafter on a CPU that has the operators compiled: features to context rows in one, blocks to drafts in two.

What graphs are on a GPU (context_passes.py, draft_passes.py): the interpreter does not stand between a product and the
next one. A pass has as many rows as are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.core.arrays import Ints
from dflash_ray.kernels import draft_ops, ops
from dflash_ray.models.context_pages import BlockPlaces, ContextPages
from dflash_ray.models.context_passes import ContextProjection
from dflash_ray.models.dflash import DflashNetwork
from dflash_ray.models.dflash2 import CandidateSelector, Draw
from dflash_ray.models.draft_choice import Choice, DraftChooser, draw_values
from dflash_ray.models.draft_layers import CompiledLayers
from dflash_ray.models.draft_passes import Blocks, HostChoice
from dflash_ray.models.packed_linear import PackedLinear

_NO_IDS = torch.empty(0, dtype=torch.int64)


class CompiledDrafts:
    """Passes of any number of blocks; those that are causal in all layers have as many slots as are asked for.

    Args:
        embedding: float32 [V, H]; turns: cos and sin [P, d] of all positions.
    """

    def __init__(
        self,
        network: DflashNetwork,
        layers: CompiledLayers,
        chooser: DraftChooser,
        embedding: Tensor,
        turns: tuple[Tensor, Tensor],
    ) -> None:
        self._config, self._layers, self._chooser = network.config, layers, chooser
        # numpy finds a few rows of a table sooner than torch does.
        self._embedding: NDArray[np.float32] = embedding.numpy()
        self._cos, self._sin = (turn.numpy() for turn in turns)
        self._norm = network.norm.weight.detach()
        self._choice_weights = None if chooser.selector is None else self._weights_of(chooser.selector)

    def _weights_of(self, selector: CandidateSelector) -> draft_ops.ChoiceWeights:
        predecessors, successors = (book.detach().contiguous() for book in selector.codebooks())
        projection = PackedLinear(selector.hidden_projection.weight)
        ids = _NO_IDS if self._chooser.ids is None else self._chooser.ids
        return draft_ops.ChoiceWeights(
            self._norm, self._chooser.head.weight, projection.weight, predecessors, successors, ids
        )

    def __call__(
        self, blocks: Blocks, draws: Sequence[Draw], num_candidates: int, wants_scores: bool, pages: ContextPages
    ) -> HostChoice:
        """What is chosen for the slots; without `wants_scores` no scores."""
        config = self._config
        size = blocks.size(config.is_causal, config.block_size)
        token_ids = blocks.token_ids(size, config.mask_token_id).reshape(-1)
        positions = blocks.positions(size)
        rows, cos, sin = (
            torch.from_numpy(table.take(index, axis=0))
            for table, index in ((self._embedding, token_ids), (self._cos, positions), (self._sin, positions))
        )
        places = BlockPlaces(*map(torch.from_numpy, pages.reserve_blocks(blocks.sessions, blocks.lens, size)))
        self._layers(rows, cos, sin, pages, places)
        choice = self._choose(rows, size, blocks, draws, num_candidates, wants_scores)
        return HostChoice(*(part.numpy() for part in choice))

    def _choose(
        self, rows: Tensor, size: int, blocks: Blocks, draws: Sequence[Draw], num_candidates: int, wants_scores: bool
    ) -> Choice:
        config = self._config
        anchors = torch.from_numpy(blocks.anchor_ids)
        if self._choice_weights is None:
            hidden = ops.rms_norm(rows, self._norm, config.rms_norm_eps).view(len(anchors), size, -1)
            return self._chooser(hidden[:, 1 : 1 + blocks.num_slots], anchors, None, num_candidates)
        columns = map(torch.from_numpy, (blocks.anchor_ids, *draw_values(draws), blocks.lens + 1))
        return Choice(
            *draft_ops.choose_drafts(
                rows, self._choice_weights, *columns, size, blocks.num_slots, num_candidates, config.rms_norm_eps,
                config.output_multiplier, config.final_logit_softcapping, wants_scores,
            )
        )  # fmt: skip


class CompiledContexts:
    """Features [n, H] to their rows of the pool."""

    def __init__(self, projection: ContextProjection, eps: float) -> None:
        self._projection, self._eps = projection, eps

    def __call__(self, positions: Ints, rows: Ints, features: Tensor, pages: ContextPages) -> None:
        """Stores the context rows of features [n, H] of these positions [n] in rows [n] of the pool."""
        made = self._projection
        draft_ops.store_context(
            features.contiguous(), made.linear.weight, made.linear.bias, made.norms, *made.turns,
            torch.from_numpy(positions), torch.from_numpy(rows), pages.keys, pages.values, self._eps,
        )  # fmt: skip
