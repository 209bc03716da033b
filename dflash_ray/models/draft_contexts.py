"""The sessions of one drafter: who has one, how many context rows it holds, and whether there is room for more.

The one owner of a drafter's sessions, inside a drafter replica as inside a target: nothing else opens or closes them.
A session lives until its owner closes it, its rows find no room, or the drafter fails at them; it is never dropped to
make room for another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dflash_ray.core.arrays import Ints
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_proposals import DraftProposals


class ContextRows(NamedTuple):
    """counts[i] rows of sessions[i] at positions starts[i], starts[i] + 1, ..., one session's after the other's.

    Attributes:
        features: [sum of counts, H], for a method that reads them.
        token_ids: [sum of counts], for one that reads tokens alone.
    """

    sessions: Ints
    starts: Ints
    counts: Ints
    features: Tensor | None = None
    token_ids: Ints | None = None

    def part(self, place: int, first: int, skipped: int) -> ContextRows:
        """One session's rows, which begin at row `first`, without so many of them."""
        count = int(self.counts[place]) - skipped
        rows = slice(first + skipped, first + skipped + count)
        return ContextRows(
            self.sessions[place : place + 1],
            self.starts[place : place + 1] + skipped,
            np.array([count]),
            None if self.features is None else self.features[rows],
            None if self.token_ids is None else self.token_ids[rows],
        )


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

    def extend(self, rows: ContextRows) -> None:
        """Appends rows that follow those held, of sessions that are open; one may have several parts."""

    def catch_up(self) -> None:
        """Does with rows appended what the next draft would begin with; if it raises, that draft tries again."""

    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: Sequence[Draw],
        tree_width: int = 1,
    ) -> DraftProposals: ...


class Refusal(Enum):
    """Why rows were not taken, where the method did not fail at them."""

    GAP = "gap"  # rows before them are missing; the session is as it was
    NO_ROOM = "no room"  # the session is closed


class DraftContexts:
    """Sessions over one draft method, numbered by their owner from 0 on: arrays are as long as the largest number.

    Args:
        max_rows: context rows held over all sessions.
    """

    def __init__(self, method: DraftMethod, max_rows: int) -> None:
        self._method = method
        self._max_rows = max_rows
        self._lens = np.zeros(64, dtype=np.int64)  # rows held; a session without any is not open
        self.num_rows = 0

    def __len__(self) -> int:
        return int(np.count_nonzero(self._lens))

    def context_lens(self, sessions: Ints) -> Ints:
        """[n] context rows held; 0 for unknown sessions."""
        self._make_room(sessions)
        lens: Ints = self._lens[sessions]
        return lens

    def extend(self, rows: ContextRows) -> dict[int, Refusal | Exception]:
        """Takes rows; those from 0 on open a session, and those that are held already are ignored.

        Returns the sessions whose rows were not taken, and why; one at whose rows the method failed is closed.
        """
        sessions = rows.sessions.tolist()
        if self._all_follow(rows) and self.num_rows + int(rows.counts.sum()) <= self._max_rows:
            fault = self._append(rows)
            return {} if fault is None else dict.fromkeys(sessions, fault)
        faults: dict[int, Refusal | Exception] = {}
        first = 0
        for place, (session, count) in enumerate(zip(sessions, rows.counts.tolist(), strict=True)):
            # What follows a gap, or rows that found no room, cannot be taken either.
            if session not in faults and (fault := self._extend_one(rows, place, first)) is not None:
                faults[session] = fault
            first += count
        return faults

    def _all_follow(self, rows: ContextRows) -> bool:
        """Whether all sessions are open, and all rows those that come next, some of them in several parts."""
        expected = self.context_lens(rows.sessions)
        if np.count_nonzero(expected) < len(expected):
            return False
        if np.bincount(rows.sessions).max(initial=0) <= 1:
            return np.count_nonzero(rows.starts != expected) == 0
        order = rows.sessions.argsort(kind="stable")
        sessions, starts, expected = rows.sessions[order], rows.starts[order], expected[order]
        is_same = sessions[1:] == sessions[:-1]
        expected[1:][is_same] = (starts + rows.counts[order])[:-1][is_same]
        return np.count_nonzero(starts != expected) == 0

    def _extend_one(self, rows: ContextRows, place: int, first: int) -> Refusal | Exception | None:
        session, start, count = int(rows.sessions[place]), int(rows.starts[place]), int(rows.counts[place])
        held = int(self._lens[session])
        if start > held:
            return Refusal.GAP
        new = start + count - held
        if new <= 0:
            return None
        if self.num_rows + new > self._max_rows:
            self.close([session])
            return Refusal.NO_ROOM
        return self._append(rows.part(place, first, count - new), is_new=not held)

    def _append(self, rows: ContextRows, is_new: bool = False) -> Refusal | Exception | None:
        """Rows that follow those held and have room; closes their sessions when the method fails."""
        sessions = rows.sessions.tolist()
        try:
            if is_new:
                self._method.open(sessions[0])
            self._method.extend(rows)
        except Exception as fault:
            try:
                self._drop(list(dict.fromkeys(sessions)))
            except Exception as other:
                return other
            # Less room than max_rows promised.
            return Refusal.NO_ROOM if isinstance(fault, torch.OutOfMemoryError) else fault
        self._lens[rows.sessions] = rows.starts + rows.counts  # of several parts the last one counts
        self.num_rows += int(rows.counts.sum())
        return None

    def catch_up(self) -> None:
        """Leaves less for the next draft to do, while there is none. What the method raises goes on to the caller."""
        self._method.catch_up()

    def close(self, sessions: Iterable[int]) -> None:
        """Forgets sessions; unknown ones are ignored. What the method raises goes on to the caller after all."""
        self._drop([session for session in sessions if session < len(self._lens) and self._lens[session]])

    def _drop(self, sessions: list[int]) -> None:
        faults = []
        for session in sessions:
            self.num_rows -= int(self._lens[session])
            self._lens[session] = 0
            try:
                self._method.close(session)
            except Exception as fault:
                faults.append(fault)
        if faults:
            raise faults[0]

    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: Sequence[Draw],
        tree_width: int = 1,
    ) -> DraftProposals:
        """Drafts after each session's anchor, which stands at position context_len.

        What the method raises goes on to the caller, and the sessions asked for are closed.
        """
        try:
            return self._method.propose(sessions, anchor_ids, num_draft_tokens, num_candidates, draws, tree_width)
        except Exception:
            self.close(sessions)
            raise

    def _make_room(self, sessions: Ints) -> None:
        most = int(sessions.max(initial=0))
        if most >= len(self._lens):
            self._lens = np.pad(self._lens, (0, most + 1))
