"""Sessions of one replica: rows taken into contexts, and drafts from them.

All work on tensors happens here, on the one thread that it is given. Knows nothing of streams.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_ray.core.arrays import Flags, Ids, Ints
from dflash_ray.drafter.rows import Rows, joined
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_contexts import DraftContexts, DraftMethod, Refusal
from dflash_ray.pb import common_pb2, drafter_pb2

logger = logging.getLogger(__name__)

Key = tuple[int, int]  # router's stream, sequence: two routers may use the same sequence id
Reason = drafter_pb2.MissingReason
COMING, LOST = drafter_pb2.MISSING_REASON_COMING, drafter_pb2.MISSING_REASON_LOST
REFUSED, PASSED = drafter_pb2.MISSING_REASON_REFUSED, drafter_pb2.MISSING_REASON_PASSED


class Draws(Sequence[Draw]):
    """How sequences draw, in columns: most methods never look."""

    def __init__(self, temperatures: NDArray[np.float32], seeds: Ids, wants_distributions: Flags) -> None:
        self._temperatures, self._seeds, self._wants_distributions = temperatures, seeds, wants_distributions

    def __len__(self) -> int:
        return len(self._seeds)

    @overload
    def __getitem__(self, at: int) -> Draw: ...

    @overload
    def __getitem__(self, at: slice) -> Draws: ...

    def __getitem__(self, at: int | slice) -> Draw | Draws:
        columns = self._temperatures[at], self._seeds[at], self._wants_distributions[at]
        if isinstance(at, slice):
            return Draws(*columns)
        return Draw(float(columns[0]), int(columns[1]), bool(columns[2]))

    def only(self, flags: Flags) -> Draws:
        """Those of some of the sequences."""
        return Draws(self._temperatures[flags], self._seeds[flags], self._wants_distributions[flags])


class Proposals(NamedTuple):
    """Drafts that are wanted for committed lengths, one element a session."""

    sessions: Ints
    sequence_ids: Ints
    committed_lens: Ints
    anchor_ids: Ints
    num_draft_tokens: Ints
    draws: Draws

    def only(self, flags: Flags) -> Proposals:
        """Those for some of the sessions."""
        return Proposals(
            self.sessions[flags],
            self.sequence_ids[flags],
            self.committed_lens[flags],
            self.anchor_ids[flags],
            self.num_draft_tokens[flags],
            self.draws.only(flags),
        )


class DraftSessions:
    """Sessions of all streams over one draft method.

    Args:
        max_context_tokens: context rows held over all sessions.
    """

    def __init__(self, method: DraftMethod, max_context_tokens: int) -> None:
        self._method = method
        self._contexts = DraftContexts(method, max_context_tokens)

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def num_context_rows(self) -> int:
        return self._contexts.num_rows

    def close(self, sessions: Iterable[int]) -> None:
        """Forgets sessions; unknown ones are ignored."""
        self._contexts.close(sessions)

    def extend(self, parts: Iterable[Rows]) -> dict[int, Reason]:
        """Takes rows; returns the sessions that are lost by it, and why."""
        found, gone = joined(parts)
        lost: dict[int, Reason] = dict.fromkeys(gone, LOST)
        for rows in found:
            faults = self._contexts.extend(rows)
            lost |= {session: REFUSED if fault is Refusal.NO_ROOM else LOST for session, fault in faults.items()}
            for fault in {id(fault): fault for fault in faults.values()}.values():
                if isinstance(fault, Exception):
                    logger.error("rows could not be taken; their sessions are dropped", exc_info=fault)
        self.close(lost)
        return lost

    def extend_ahead(self, parts: Iterable[Rows]) -> dict[int, Reason]:
        """The same while nothing is to be drafted, with the work on the rows that a draft would find undone."""
        lost = self.extend(parts)
        try:
            self._contexts.catch_up()
        except Exception:
            logger.warning("rows could not be worked on ahead; the next draft tries again", exc_info=True)
        return lost

    def propose(
        self, wanted: Proposals, tree_width: int, epoch: int
    ) -> tuple[common_pb2.DraftBlocks, dict[int, Reason]]:
        """Blocks for sessions whose context is whole, and why there is none for the others."""
        held = self._contexts.context_lens(wanted.sessions)
        is_ready = (held > 0) & (held == wanted.committed_lens - 1)
        missing: dict[int, Reason] = {}
        if not is_ready.all():
            has_passed = held >= wanted.committed_lens
            for session, is_past in zip(wanted.sessions[~is_ready].tolist(), has_passed[~is_ready], strict=True):
                missing[session] = PASSED if is_past else LOST
            wanted = wanted.only(is_ready)
        sessions = wanted.sessions.tolist()
        if not sessions:
            return common_pb2.DraftBlocks(), missing
        counts = wanted.num_draft_tokens
        if tree_width <= 1:  # a tree may have more nodes than a chain has slots
            counts = np.minimum(counts, self._method.max_draft_tokens)
        try:
            drafts = self._contexts.propose(
                sessions,
                wanted.anchor_ids.tolist(),
                counts.tolist(),
                1,
                wanted.draws,
                tree_width,
            )
        except Exception as error:
            # A draft is advice: the router goes on without it, and the sessions at fault are rebuilt.
            logger.exception("a draft pass failed; its sessions are dropped")
            reason = REFUSED if isinstance(error, torch.OutOfMemoryError) else LOST
            return common_pb2.DraftBlocks(), missing | dict.fromkeys(sessions, reason)
        return drafts.blocks(wanted.sequence_ids, wanted.committed_lens).message(epoch), missing
