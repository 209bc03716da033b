"""The ways of drafting that a replica can serve: DFlash from context features, n-gram from token ids alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.ngram import MAX_NGRAM, IndexingRoom, NgramIndex
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target

_INDEXED_AT_ONCE = 8192  # tokens of long texts that one proposal indexes for n-grams, of all sessions together


@dataclass(frozen=True, slots=True)
class Proposal:
    """Candidates of one sequence, the draft first in each slot; both lists are [num_slots * num_candidates].

    `is_drawn` is as in `DraftProposal`.
    """

    num_slots: int
    num_candidates: int
    candidate_ids: list[int]
    log_probs: list[float]
    is_drawn: bool = False


class DraftMethod(Protocol):
    """Per-session context and proposals. Sessions are numbered by the caller; nothing here is thread-safe."""

    name: str
    fingerprint: str
    max_draft_tokens: int
    needs_features: bool

    def open(self, session: int) -> None: ...

    def close(self, session: int) -> None: ...

    def context_len(self, session: int) -> int: ...

    def extend(self, session: int, start: int, token_ids: Sequence[int], features: torch.Tensor | None) -> None:
        """Appends rows at positions start, start + 1, ...; start is at most context_len, rows below it are ignored."""

    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: list[Draw],
    ) -> list[Proposal]: ...


class DflashMethod:
    """One pass of a DFlash or DFlash 2 network over all sessions asked for."""

    needs_features = True

    def __init__(self, block_drafter: BlockDrafter) -> None:
        self._drafter = block_drafter
        self.name = "dflash" if block_drafter.config.dflash2 is None else "dflash2"
        self.fingerprint = block_drafter.fingerprint
        self.max_draft_tokens = block_drafter.max_draft_tokens

    def open(self, session: int) -> None:
        self._drafter.open(session)

    def close(self, session: int) -> None:
        self._drafter.close(session)

    def context_len(self, session: int) -> int:
        return self._drafter.context_len(session)

    def extend(self, session: int, start: int, token_ids: Sequence[int], features: torch.Tensor | None) -> None:
        assert features is not None
        self._drafter.extend(session, start, features)

    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: list[Draw],
    ) -> list[Proposal]:
        drafts = self._drafter.propose(sessions, anchor_ids, num_draft_tokens, num_candidates, draws)
        return [
            Proposal(
                draft.candidate_ids.shape[0],
                draft.candidate_ids.shape[1],
                draft.candidate_ids.flatten().tolist(),
                draft.logprobs.flatten().tolist(),
                draft.is_drawn,
            )
            for draft in drafts
        ]


class NgramMethod:
    """Prompt lookup over each session's own tokens."""

    name = "ngram"
    fingerprint = f"ngram-{MAX_NGRAM}"
    max_draft_tokens = 31
    needs_features = False

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    def open(self, session: int) -> None:
        self._indexes[session] = NgramIndex()

    def close(self, session: int) -> None:
        self._indexes.pop(session, None)

    def context_len(self, session: int) -> int:
        return len(self._indexes[session])

    def extend(self, session: int, start: int, token_ids: Sequence[int], features: torch.Tensor | None) -> None:
        index = self._indexes[session]
        index.extend(token_ids[len(index) - start :])

    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: list[Draw],
    ) -> list[Proposal]:
        proposals = []
        room = IndexingRoom(_INDEXED_AT_ONCE)
        for session, anchor_id, count in zip(sessions, anchor_ids, num_draft_tokens, strict=True):
            index = self._indexes[session]
            index.catch_up(room)
            draft = index.propose_after(anchor_id, count).tokens
            proposals.append(Proposal(len(draft), 1, draft, [0.0] * len(draft)))
        return proposals


def load_method(config: DflashRayConfig) -> DraftMethod:
    """The configured method, its weights loaded. Raises ValueError when the checkpoint does not fit the target."""
    if config.drafter.method == "ngram":
        return NgramMethod()
    target = resolve_target(config.model.path)
    drafter = BlockDrafter(
        resolve_drafter(config.drafter.path, target),
        target,
        device=config.drafter.device,
        dtype=getattr(torch, config.drafter.dtype),
        max_context_tokens=config.drafter.max_context_tokens,
    )
    return DflashMethod(drafter)
