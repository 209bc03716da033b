"""A drafter's sessions from the rows that come to the drafts that leave, against a plain model of both."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dflash_ray.drafter.arrivals import Arrivals
from dflash_ray.drafter.rows import Rows
from dflash_ray.drafter.sessions import LOST, PASSED, REFUSED, DraftSessions, Draws, Proposals
from tests.property.test_draft_contexts_machine import MAX_ROWS, Recorder
from tests.toy import drafts_of

KEYS = st.sampled_from([(stream, sequence) for stream in (1, 2) for sequence in (7, 8)])


class DraftSessionsMachine(RuleBasedStateMachine):
    """Rows of several routers' sequences come, are taken and drafted from, in any order, with too little room.

    `come` has the tokens of every session that arrived and were not lost, `taken` how many of them the context holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.method = Recorder()
        self.sessions = DraftSessions(self.method, MAX_ROWS)
        self.arrivals = Arrivals()
        self.come: dict[tuple[int, int], list[int]] = {}
        self.taken: dict[tuple[int, int], int] = {}
        self.lost: set[tuple[int, int]] = set()

    @rule(key=KEYS, back=st.sampled_from([0, 0, 0, 2, -1]), count=st.integers(1, 9), is_late=st.booleans())
    def rows_come(self, key, back, count, is_late):
        """From `back` rows before the last one; late ones are of a stream from before the session was lost."""
        if not is_late or key not in self.come:
            self.arrivals.open(key)
            if key not in self.come or key in self.lost:
                self.come[key] = []
                self.lost.discard(key)
        known = self.come[key]
        start = max(0, len(known) - back)
        tokens = [100 * key[1] + at for at in range(start, start + count)]
        columns = np.array([[self.arrivals.session(key)], [start], [count]])
        took = self.arrivals.put(Rows.of(*columns, np.array(tokens, dtype=np.uint32))) is None
        if key in self.lost:
            assert took, "what comes late for a lost session is no gap"
            return
        assert took == (start <= len(known)), "rows behind a gap are not kept"
        if took:
            known.extend(tokens[len(known) - start :])

    def _extend(self, keys, fault: type[Exception] | None = None) -> None:
        """The compute thread takes what has come for these sessions."""
        self.method.fault = fault
        rows = self.arrivals.take(np.array([self.arrivals.session(key) for key in keys]))
        lost = self.sessions.extend(rows)
        self.method.fault = None
        key_of = {self.arrivals.session(key): key for key in keys}
        for session, count in ((session, count) for one in rows for session, count in zip(*one[:3:2], strict=True)):
            key = key_of[int(session)]
            if int(session) not in lost:
                self.taken[key] = self.taken.get(key, 0) + int(count)
        for session, reason in lost.items():
            known = sum(one.counts[one.sessions == session].sum() for one in rows)
            assert known, "who has no new rows is not lost"
            assert fault is not None or reason == REFUSED
            self.taken.pop(key_of[session], None)
        if fault is None:
            assert not lost or sum(one.num_rows for one in rows) + sum(self.taken.values()) > MAX_ROWS
        else:
            assert len(lost) == len({int(session) for one in rows for session in one.sessions})
        self._lose({key_of[session]: reason for session, reason in lost.items()})

    def _lose(self, lost) -> None:
        self.arrivals.lose([self.arrivals.session(key) for key in lost], list(lost.values()))
        for key in lost:
            self.come[key] = []
            self.lost.add(key)

    @precondition(lambda self: self.come)
    @rule(data=st.data(), fault=st.sampled_from([None, None, None, RuntimeError, torch.OutOfMemoryError]))
    def rows_are_taken(self, data, fault):
        self._extend(data.draw(st.lists(st.sampled_from(sorted(self.come)), unique=True, min_size=1)), fault)

    @precondition(lambda self: self.come)
    @rule(data=st.data(), ahead=st.integers(0, 2), fails=st.booleans())
    def drafts_are_wanted(self, data, ahead, fails):
        keys = data.draw(st.lists(st.sampled_from(sorted(self.come)), unique=True, min_size=1))
        lens = {key: self.taken.get(key, 0) + ahead for key in keys}
        numbers = [self.arrivals.session(key) for key in keys]
        rows = [(number, key[1], lens[key], key[0], 1) for number, key in zip(numbers, keys, strict=True)]
        zeros = np.zeros(len(keys))
        draws = Draws(zeros.astype(np.float32), zeros.astype(np.uint64), zeros > 0)
        wanted = Proposals(*np.array(rows).T, draws)
        whole = [key for key in keys if ahead == 1 and self.taken.get(key)]
        self.method.fault = RuntimeError if fails else None
        blocks, reasons = self.sessions.propose(wanted, 1, epoch=3)
        missing = {key: reasons[number] for number, key in zip(numbers, keys, strict=True) if number in reasons}
        drafts = drafts_of(blocks)
        self.method.fault = None
        assert missing.keys() == set(keys) - (set() if fails else set(whole))
        if fails:
            assert not drafts and all(missing[key] == LOST for key in whole)
        else:
            assert list(blocks.sequence_ids) == [key[1] for key in whole]
            assert drafts == {key[1]: [sum(self.come[key][: self.taken[key]]) + key[0]] for key in whole}
        assert all(missing[key] == (LOST if ahead else PASSED) for key in missing if key not in whole and lens[key])
        gone = {key: reason for key, reason in missing.items() if reason != PASSED}
        if fails:
            for key in whole:
                self.taken.pop(key)
        self.sessions.close([self.arrivals.session(key) for key in gone])
        for key in gone:
            self.taken.pop(key, None)
        self._lose(gone)

    @precondition(lambda self: len(self.come) > 1)
    @rule(key=KEYS)
    def close(self, key):
        self._close(key)

    def _close(self, key) -> None:
        closed = self.arrivals.close([key])
        assert bool(closed) == (key in self.come)
        self.sessions.close(closed)
        self.arrivals.release(closed)
        self.come.pop(key, None)
        self.taken.pop(key, None)
        self.lost.discard(key)

    @precondition(lambda self: len(self.taken) > 2)
    @rule(stream=st.sampled_from([1, 2]))
    def a_routers_stream_ends(self, stream):
        keys = self.arrivals.of_stream(stream)
        assert sorted(keys) == sorted(key for key in self.come if key[0] == stream)
        for key in keys:
            self._close(key)

    @invariant()
    def every_row_that_came_is_held_or_waits(self):
        assert len(self.sessions) == len(self.taken) == len(self.method.contexts)
        assert self.sessions.num_context_rows == sum(self.taken.values()) <= MAX_ROWS
        for key, tokens in self.come.items():
            session = self.arrivals.session(key)
            assert self.arrivals.ends[session] == len(tokens)
            num_waiting = sum(rows.counts[rows.sessions == session].sum() for rows in self.arrivals._waiting)
            assert len(tokens) - num_waiting == self.taken.get(key, 0)
        held = [tokens[: self.taken[key]] for key, tokens in self.come.items() if self.taken.get(key)]
        assert sorted(self.method.contexts.values()) == sorted(held)


TestDraftSessions = DraftSessionsMachine.TestCase
TestDraftSessions.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
