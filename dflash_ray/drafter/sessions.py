"""Sessions of one replica: rows taken into contexts, and drafts from them.

All work on tensors happens here, on the one thread that it is given. Knows nothing of streams.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_contexts import DraftContexts, DraftMethod, Extension, to_message
from dflash_ray.pb import common_pb2, drafter_pb2

logger = logging.getLogger(__name__)

Key = tuple[int, int]  # router's stream, sequence: two routers may use the same sequence id
Reason = drafter_pb2.MissingReason
COMING, LOST = drafter_pb2.MISSING_REASON_COMING, drafter_pb2.MISSING_REASON_LOST
REFUSED, PASSED = drafter_pb2.MISSING_REASON_REFUSED, drafter_pb2.MISSING_REASON_PASSED


class Rows(NamedTuple):
    """Rows of positions start, start + 1, ... of a session: features [n, H] in parts, or tokens."""

    key: Key
    start: int
    features: Sequence[Tensor] = ()
    token_ids: Sequence[int] = ()


class Proposal(NamedTuple):
    """A draft that is wanted for a committed length."""

    key: Key
    committed_len: int
    anchor_id: int
    num_draft_tokens: int
    draw: Draw


class DraftSessions:
    """Sessions of all streams over one draft method.

    Args:
        max_context_tokens: context rows held over all sessions.
    """

    def __init__(self, method: DraftMethod, max_context_tokens: int) -> None:
        self._method = method
        self._contexts: DraftContexts[Key] = DraftContexts(method, max_context_tokens)

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def num_context_rows(self) -> int:
        return self._contexts.num_rows

    def close(self, keys: Iterable[Key]) -> None:
        """Forgets sessions; unknown ones are ignored."""
        for key in keys:
            self._contexts.close(key)

    def extend(self, parts: Iterable[Rows]) -> dict[Key, Reason]:
        """Takes rows; returns the sessions that are lost by it, and why."""
        faults: dict[Key, Reason] = {}
        for part in parts:
            if part.key in faults:
                continue  # what follows a gap, or rows that found no room, cannot be taken either
            try:
                features = None
                if part.features:
                    features = part.features[0] if len(part.features) == 1 else torch.cat(list(part.features))
                extension = self._contexts.extend(part.key, part.start, features, part.token_ids)
            except Exception:
                logger.exception("rows could not be taken; their session is dropped")
                extension = Extension.GAP
            if extension is not Extension.HELD:
                self._contexts.close(part.key)
                faults[part.key] = REFUSED if extension is Extension.REFUSED else LOST
        return faults

    def propose(
        self, wanted: Sequence[Proposal], tree_width: int, epoch: int
    ) -> tuple[common_pb2.DraftBlocks, dict[Key, Reason]]:
        """Blocks for sessions whose context is whole, and why there is none for the others."""
        faults: dict[Key, Reason] = {}
        ready = []
        for one in wanted:
            held = self._contexts.context_len(one.key)
            if held and held == one.committed_len - 1:
                ready.append(one)
            else:
                faults[one.key] = PASSED if held >= one.committed_len else LOST
        if not ready:
            return common_pb2.DraftBlocks(), faults
        longest = self._method.max_draft_tokens
        try:
            drafts = self._contexts.propose(
                [one.key for one in ready],
                [one.anchor_id for one in ready],
                [one.num_draft_tokens if tree_width > 1 else min(one.num_draft_tokens, longest) for one in ready],
                1,
                [one.draw for one in ready],
                tree_width,
            )
        except Exception as error:
            # A draft is advice: the router goes on without it, and the sessions at fault are rebuilt.
            logger.exception("a draft pass failed; its sessions are dropped")
            reason = REFUSED if isinstance(error, torch.OutOfMemoryError) else LOST
            return common_pb2.DraftBlocks(), faults | {one.key: reason for one in ready}
        lens = [one.committed_len for one in ready]
        return to_message(epoch, [one.key[1] for one in ready], lens, drafts), faults
