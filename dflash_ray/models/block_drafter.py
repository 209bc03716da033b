"""Draft blocks for many sequences: context keys and values of each, and one pass over all blocks asked for.

The network is the one of dflash.py with its weights fused and packed for few rows. A session's context grows by the
features of committed rows and is never verified: dropping it costs drafts, not tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dflash_ray.core.arrays import Ints, spans
from dflash_ray.core.draft_trees import likeliest_trees
from dflash_ray.core.memory import return_freed_memory
from dflash_ray.kernels import build
from dflash_ray.models.compiled_drafts import CompiledContexts, CompiledDrafts
from dflash_ray.models.context_features import select_rows
from dflash_ray.models.context_pages import ContextPages
from dflash_ray.models.context_passes import ContextPasses, ContextProjection
from dflash_ray.models.dflash import rope_tables
from dflash_ray.models.dflash2 import Draw, log_chances
from dflash_ray.models.draft_choice import DraftChooser, DrawColumns, draw_values
from dflash_ray.models.draft_contexts import ContextRows
from dflash_ray.models.draft_head import build_selector, load_draft_head
from dflash_ray.models.draft_layers import CompiledLayers, DeviceLayers, draft_layers
from dflash_ray.models.draft_passes import Blocks, DraftPasses, HostChoice
from dflash_ray.models.draft_proposals import DraftProposal, DraftProposals
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.packed_linear import PackedLinear
from dflash_ray.models.target_checkpoint import TargetCheckpoint

_ROWS_A_PRODUCT = (
    128  # that wait for each other, so that a few rows each of many sessions share one pass over the weights
)


class ContextGap(ValueError):
    """Features were sent that do not follow the rows held."""

    def __init__(self, session: int, have: int) -> None:
        super().__init__(f"session {session} holds {have} context rows")
        self.session = session
        self.have = have


class _Waiting(NamedTuple):
    """Rows that wait, of positions starts[i], starts[i] + 1, ... of sessions[i], one session's after the other's."""

    sessions: list[_Session]
    starts: Ints
    counts: Ints
    features: Tensor


def _joined(parts: Sequence[_Waiting]) -> _Waiting:
    """What waits in several parts as one."""
    return _Waiting(
        [one for part in parts for one in part.sessions],
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.counts for part in parts]),
        torch.cat([part.features for part in parts]),
    )


@dataclass(slots=True)
class _Session:
    """One sequence's context: `length` rows in pages, and behind them those that wait, up to `end`."""

    number: int
    length: int = 0
    end: int = 0


class BlockDrafter:
    """Sessions and proposals over one drafter checkpoint. Not thread-safe. Holds what it is told to hold:
    `draft_contexts.DraftContexts` decides about room.
    """

    def __init__(
        self,
        checkpoint: DrafterCheckpoint,
        target: TargetCheckpoint,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = checkpoint.config
        self.name = "dflash" if self.config.dflash2 is None else "dflash2"
        self.fingerprint = checkpoint.fingerprint
        self.feature_width = self.config.hidden_size
        self.block_size = self.config.block_size
        self.max_draft_tokens = self.block_size - 1
        self._device, self._dtype = device, dtype
        network = checkpoint.build_network(dtype).to(device)
        self._layers = draft_layers(network)
        self._pages = ContextPages(
            self.config.num_hidden_layers, self.config.num_key_value_heads, self.config.head_dim, dtype, device
        )
        embedding = target.load_embedding(dtype) if checkpoint.embedding is None else checkpoint.embedding.to(dtype)
        self._embedding = embedding.to(device) * self.config.input_embedding_scale
        ids, head = load_draft_head(checkpoint, target, dtype, device)
        selector = build_selector(network, self._embedding, ids, head)
        self._chooser = DraftChooser(network, PackedLinear(head), selector, ids)
        # The target may serve longer texts than the drafter was trained on; its last block reaches past them.
        longest = max(self.config.max_position_embeddings, target.config.max_position_embeddings)
        cos, sin = rope_tables(self.config, longest + self.block_size)
        self._turns = cos.to(device), sin.to(device)
        self._projection = ContextProjection(network, self._turns, dtype)
        self._passes: CompiledDrafts | DraftPasses | None = None
        self._context_passes: CompiledContexts | ContextPasses | None = None
        if isinstance(self._layers, CompiledLayers):
            self._passes = CompiledDrafts(network, self._layers, self._chooser, self._embedding, self._turns)
            self._context_passes = CompiledContexts(self._projection, self.config.rms_norm_eps)
        elif device == "cpu" or build.is_loaded_for(device):
            self._passes = DraftPasses(
                self._layers, self._chooser, self._embedding, self._turns, self.block_size,
                self.config.mask_token_id,
            )  # fmt: skip
            self._context_passes = ContextPasses(self._projection, self.feature_width, dtype, torch.device(device))
        self._sessions: dict[int, _Session] = {}
        self._waiting: list[_Waiting] = []
        self._num_waiting = 0  # rows of it
        return_freed_memory()

    def open(self, session: int) -> None:
        """Starts a session without context; one that is open starts again."""
        self.close(session)
        self._sessions[session] = _Session(session)

    def close(self, session: int) -> None:
        """Forgets a session; unknown ones are ignored."""
        if self._sessions.pop(session, None) is not None:
            self._pages.release(session)

    def context_len(self, session: int) -> int:
        """Context rows held; 0 for unknown sessions."""
        held = self._sessions.get(session)
        return 0 if held is None else held.end

    @torch.inference_mode()
    def extend(self, rows: ContextRows) -> None:
        """Appends context rows made from features. Raises ContextGap where they do not follow the rows held."""
        assert rows.features is not None
        held = []
        columns = (rows.sessions, rows.starts, rows.counts)
        for session, start, count in zip(*(column.tolist() for column in columns), strict=True):
            one = self._sessions.get(session)
            if one is None or start != one.end:
                raise ContextGap(session, self.context_len(session))
            one.end += count
            held.append(one)
        self._waiting.append(_Waiting(held, rows.starts, rows.counts, rows.features))
        self._num_waiting += len(rows.features)
        if self._num_waiting >= _ROWS_A_PRODUCT:
            self._take_features()

    def extend_one(self, session: int, start: int, features: Tensor) -> None:
        """The same for one session, with features [n, H]; rows that are held already are ignored."""
        skipped = max(0, self.context_len(session) - start)
        if skipped < len(features):
            rows = features[skipped:]
            self.extend(ContextRows(np.array([session]), np.array([start + skipped]), np.array([len(rows)]), rows))

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Makes context rows of all features that wait."""
        self._take_features()

    def _take_features(self) -> None:
        """Makes context rows of all features that wait. After a fault those that were not taken still wait."""
        if not self._waiting:
            return
        held, starts, counts, features = self._waiting[0] if len(self._waiting) == 1 else _joined(self._waiting)
        features = features.to(self._device, self._dtype)
        if not all(self._sessions.get(one.number) is one for one in held):
            is_open = np.array([self._sessions.get(one.number) is one for one in held])
            features = select_rows(features, np.flatnonzero(np.repeat(is_open, counts)))
            held = [one for one, flag in zip(held, is_open.tolist(), strict=True) if flag]
            starts, counts = starts[is_open], counts[is_open]
        sessions = np.array([one.number for one in held], dtype=np.int64)
        positions = spans(starts, counts)
        self._pages.reserve(sessions, starts + counts)
        rows = self._pages.rows_at(np.repeat(sessions, counts), positions)
        if self._context_passes is not None:
            self._context_passes(positions, rows, features, self._pages)
        else:
            made = self._projection(torch.from_numpy(positions), features)
            self._pages.store(self._on_device(rows), *made)
        for one, end in zip(held, (starts + counts).tolist(), strict=True):
            one.length = end
        self._waiting, self._num_waiting = [], 0

    @torch.inference_mode()
    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: Sequence[Draw] | None = None,
        tree_width: int = 1,
    ) -> DraftProposals:
        """Candidates for the positions after each session's anchor, which stands at position context_len.

        A block whose later slots may be seen always has its trained size and is cut afterwards: fewer masks would be
        another input. One that is causal in all layers has as many slots as are asked for.

        Args:
            draws: how each sequence's tokens are drawn, which only a DFlash 2 drafter looks at; None is greedy.
            tree_width: above 1 trees of `num_draft_tokens` nodes come back, in which so many follow the same one at
                most. Drafts whose distribution is wanted are chains all the same.
        """
        self._take_features()
        lens = np.array([self._sessions[session].length for session in sessions], dtype=np.int64)
        counts = np.array(num_draft_tokens)
        most = min(int(counts.max(initial=0)), self.max_draft_tokens)
        draws = draws or [Draw()] * len(sessions)
        blocks = Blocks(np.array(sessions), np.array(anchor_ids), lens, most)
        wanted = self._chooser.num_candidates(max(num_candidates, tree_width))
        choice = self._choose(blocks, draws, wanted, tree_width > 1)
        if not self._chooser.draws:
            if tree_width > 1:
                return _as_trees(choice.ids, choice.log_probs[:, :, None].astype(np.float64), counts, tree_width)
            num_kept = np.full(len(counts), choice.ids.shape[2])
            is_drawn = np.zeros(len(counts), dtype=np.bool_)
            return DraftProposals(choice.ids, choice.log_probs, np.minimum(counts, most), num_kept, is_drawn)
        is_drawn = np.array([draw.wants_distribution and draw.temperature > 0 for draw in draws], dtype=np.bool_)
        if tree_width > 1:
            chances = log_chances(choice.scores, choice.candidates, draws, (lens + 1).tolist())
            trees = _as_trees(choice.candidates, chances, counts, tree_width)
            if not is_drawn.any():
                return trees
            proposals = list(trees)
            for at in np.flatnonzero(is_drawn).tolist():
                kept = at, slice(0, int(counts[at]))
                chain = torch.from_numpy(choice.ids[kept]), torch.from_numpy(choice.log_probs[kept])
                proposals[at] = DraftProposal(*chain, True)
            return DraftProposals.of(proposals)
        num_kept = np.where(is_drawn, choice.ids.shape[2], min(num_candidates, choice.ids.shape[2]))
        return DraftProposals(choice.ids, choice.log_probs, np.minimum(counts, most), num_kept, is_drawn)

    def _choose(self, blocks: Blocks, draws: Sequence[Draw], num_candidates: int, wants_scores: bool) -> HostChoice:
        """Blocks through the layers, and what is chosen for their slots."""
        if self._passes is not None:
            return self._passes(blocks, draws, num_candidates, wants_scores, self._pages)
        size = blocks.size(self.config.is_causal, self.block_size)
        columns = None
        if self._chooser.draws:
            columns = DrawColumns(*map(self._on_device, (*draw_values(draws), blocks.lens + 1)))
        # All slots are chosen for, as in a fixed pass: a library may sum a product of fewer rows in another order.
        hidden = self._forward(blocks, size)[:, 1:]
        choice = self._chooser(hidden, self._on_device(blocks.anchor_ids), columns, num_candidates)
        parts = (part[:, : blocks.num_slots] if part.dim() > 1 else part for part in choice)
        return HostChoice(*(part.cpu().numpy() for part in parts))

    def _forward(self, blocks: Blocks, size: int) -> Tensor:
        """Blocks of `size` tokens through all layers and the final norm: [N, size, H]."""
        assert isinstance(self._layers, DeviceLayers)
        token_ids = blocks.token_ids(size, self.config.mask_token_id)
        places = self._pages.place_blocks(blocks.sessions, blocks.lens, size)
        x = F.embedding(self._on_device(token_ids), self._embedding)
        positions = torch.from_numpy(blocks.positions(size))
        cos, sin = (table[positions] for table in self._turns)
        return self._layers(x, cos, sin, self._pages, places)

    def _on_device(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _as_trees(ids: Ints, chances: NDArray[np.float64], num_nodes: Ints, width: int) -> DraftProposals:
    """The likeliest trees over candidates ids [N, S, k], whose log-probabilities are [N, S, P, k]."""
    trees = likeliest_trees(chances, int(num_nodes.max()), width)
    tokens = ids[np.arange(len(ids))[:, None], trees.slots, trees.candidates]
    ones = np.ones(len(ids), dtype=np.int64)
    counts = np.minimum(num_nodes, tokens.shape[1])
    log_probs = trees.log_probs.astype(np.float32)
    return DraftProposals(tokens[..., None], log_probs[..., None], counts, ones, ones < 1, trees.parents)
