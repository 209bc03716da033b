"""Drafting without weights: what followed the latest earlier occurrence of a sequence's last tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.ngram import MAX_NGRAM, IndexingRoom, NgramIndex
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_contexts import ContextRows
from dflash_ray.models.draft_proposals import DraftProposal, DraftProposals

_INDEXED_AT_ONCE = 8192  # tokens of long texts that one proposal indexes for n-grams, of all sessions together


class NgramMethod:
    """Prompt lookup over each session's own tokens."""

    name = "ngram"
    fingerprint = f"ngram-{MAX_NGRAM}"
    max_draft_tokens = 31
    feature_width = 0

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    def open(self, session: int) -> None:
        self._indexes[session] = NgramIndex()

    def close(self, session: int) -> None:
        self._indexes.pop(session, None)

    def extend(self, rows: ContextRows) -> None:
        assert rows.token_ids is not None
        token_ids, at = rows.token_ids.tolist(), 0
        for session, count in zip(rows.sessions.tolist(), rows.counts.tolist(), strict=True):
            self._indexes[session].extend(token_ids[at : at + count])
            at += count

    def catch_up(self) -> None:
        pass  # rows are indexed as they come

    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: Sequence[Draw],
        tree_width: int = 1,
    ) -> DraftProposals:
        proposals = []
        room = IndexingRoom(_INDEXED_AT_ONCE)
        for session, anchor_id, count in zip(sessions, anchor_ids, num_draft_tokens, strict=True):
            index = self._indexes[session]
            index.catch_up(room)
            draft = index.propose_after(anchor_id, count).tokens
            proposals.append(DraftProposal(torch.tensor(draft, dtype=torch.long)[:, None], torch.zeros(len(draft), 1)))
        return DraftProposals.of(proposals)


def load(config: DflashRayConfig) -> NgramMethod:
    """The method; nothing of the configuration concerns it."""
    return NgramMethod()
