"""The sessions of one drafter: who has one, how many context rows it holds, and whether there is room for more.

The one owner of a drafter's sessions, inside a drafter replica as inside a target: nothing else opens or closes them.
A session lives until its owner closes it, its rows find no room, or the drafter fails at them; it is never dropped to
make room for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dflash_ray.core.draft_blocks import DraftBlock, packed_parents
from dflash_ray.models.block_drafter import DraftProposal
from dflash_ray.models.dflash2 import Draw
from dflash_ray.pb import common_pb2

Key = TypeVar("Key", bound=Hashable)


class DraftMethod(Protocol):
    """Contexts and proposals of numbered sessions. Not thread-safe.

    Attributes:
        feature_width: values of a context feature; 0 for a method that reads token ids alone.
    """

    name: str
    fingerprint: str
    max_draft_tokens: int
    feature_width: int

    def open(self, session: int) -> None: ...

    def close(self, session: int) -> None: ...

    def extend(self, session: int, start: int, features: Tensor | None, token_ids: Sequence[int]) -> None:
        """Appends rows at positions start, start + 1, ...; rows that are held already are ignored."""

    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: Sequence[Draw],
        tree_width: int = 1,
    ) -> list[DraftProposal]: ...


class Extension(Enum):
    """What became of rows."""

    HELD = "held"  # all of them are in the session's context
    GAP = "gap"  # rows before them are missing; the session is as it was
    REFUSED = "refused"  # there is no room for them; the session is closed


@dataclass(slots=True)
class _Session:
    number: int
    num_rows: int = 0


class DraftContexts(Generic[Key]):
    """Sessions by key over one draft method.

    Args:
        max_rows: context rows held over all sessions.
    """

    def __init__(self, method: DraftMethod, max_rows: int) -> None:
        self._method = method
        self._max_rows = max_rows
        self._sessions: dict[Key, _Session] = {}
        self._next_number = 0
        self.num_rows = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def close_all(self, is_over: Callable[[Key], bool]) -> None:
        """Forgets the sessions whose keys are over."""
        for key in [key for key in self._sessions if is_over(key)]:
            self.close(key)

    def context_len(self, key: Key) -> int:
        """Context rows held; 0 for unknown sessions."""
        session = self._sessions.get(key)
        return 0 if session is None else session.num_rows

    def extend(self, key: Key, start: int, features: Tensor | None, token_ids: Sequence[int]) -> Extension:
        """Takes rows of positions start, start + 1, ..., as features [n, H] or as tokens; rows from 0 open a session.

        What the method raises goes on to the caller, and the session is closed.
        """
        held = self.context_len(key)
        if start > held:
            return Extension.GAP
        count = start + (len(token_ids) if features is None else len(features)) - held
        if count <= 0:
            return Extension.HELD
        if self.num_rows + count > self._max_rows:
            self.close(key)
            return Extension.REFUSED
        try:
            self._append(key, start, features, token_ids)
        except torch.OutOfMemoryError:  # less room than max_rows promised
            self.close(key)
            return Extension.REFUSED
        except Exception:
            self.close(key)
            raise
        self._sessions[key].num_rows += count
        self.num_rows += count
        return Extension.HELD

    def _append(self, key: Key, start: int, features: Tensor | None, token_ids: Sequence[int]) -> None:
        if key not in self._sessions:
            self._sessions[key] = _Session(self._next_number)
            self._next_number += 1
            self._method.open(self._sessions[key].number)
        self._method.extend(self._sessions[key].number, start, features, token_ids)

    def close(self, key: Key) -> None:
        """Forgets a session; unknown ones are ignored."""
        session = self._sessions.pop(key, None)
        if session is not None:
            self.num_rows -= session.num_rows
            self._method.close(session.number)

    def propose(
        self,
        keys: Sequence[Key],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: Sequence[Draw],
        tree_width: int = 1,
    ) -> list[DraftProposal]:
        """Drafts after each session's anchor, which stands at position context_len.

        What the method raises goes on to the caller, and the sessions asked for are closed.
        """
        try:
            numbers = [self._sessions[key].number for key in keys]
            return self._method.propose(numbers, anchor_ids, num_draft_tokens, num_candidates, draws, tree_width)
        except Exception:
            for key in keys:
                self.close(key)
            raise


def to_block(sequence_id: int, committed_len: int, proposal: DraftProposal) -> DraftBlock:
    """A sequence's proposal as it goes on."""
    return DraftBlock(
        sequence_id,
        committed_len,
        proposal.candidate_ids.cpu().numpy().astype(np.uint32),
        proposal.logprobs.float().cpu().numpy(),
        proposal.is_drawn,
        None if proposal.parents is None else proposal.parents.numpy(),
    )


def to_message(
    epoch: int, sequence_ids: Sequence[int], committed_lens: Sequence[int], proposals: Sequence[DraftProposal]
) -> common_pb2.DraftBlocks:
    """The proposals of many sequences for the wire."""
    shapes = [proposal.candidate_ids.shape for proposal in proposals]
    message = common_pb2.DraftBlocks(
        epoch=epoch,
        sequence_ids=sequence_ids,
        committed_lens=committed_lens,
        num_slots=[shape[0] for shape in shapes],
        num_candidates=[shape[1] for shape in shapes],
        is_drawn=[proposal.is_drawn for proposal in proposals],
    )
    if proposals:
        ids = torch.cat([proposal.candidate_ids.reshape(-1) for proposal in proposals])
        log_probs = torch.cat([proposal.logprobs.reshape(-1) for proposal in proposals])
        message.candidate_ids = ids.cpu().numpy().astype("<u4").tobytes()
        message.log_probs = log_probs.float().cpu().numpy().astype("<f4", copy=False).tobytes()
        message.parents = packed_parents([proposal.parents for proposal in proposals], [shape[0] for shape in shapes])
    return message
