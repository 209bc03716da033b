"""The owner of a drafter's sessions, against a model of what each context holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_contexts import ContextRows, DraftContexts, Refusal
from dflash_ray.models.draft_proposals import DraftProposal, DraftProposals

MAX_ROWS = 40
KEYS = st.integers(0, 5)


class Recorder:
    """A draft method that keeps tokens as its context and fails when it is told to. Drafts sum up the context."""

    name, fingerprint, max_draft_tokens, feature_width = "recorder", "", 7, 0

    def __init__(self) -> None:
        self.contexts: dict[int, list[int]] = {}
        self.fault: type[Exception] | None = None

    def _fail(self) -> None:
        if self.fault is not None:
            raise self.fault("told to fail")

    def open(self, session: int) -> None:
        assert session not in self.contexts, "a number is given once"
        self.contexts[session] = []

    def close(self, session: int) -> None:
        del self.contexts[session]

    def extend(self, rows: ContextRows) -> None:
        self._fail()
        at = 0
        for session, start, count in zip(*(column.tolist() for column in rows[:3]), strict=True):
            assert start == len(self.contexts[session]) and count, "only what comes next reaches the method"
            self.contexts[session] += rows.token_ids[at : at + count].tolist()
            at += count
        assert at == len(rows.token_ids)

    def propose(self, sessions, anchor_ids, num_draft_tokens, num_candidates, draws, tree_width=1) -> DraftProposals:
        self._fail()
        sums = [sum(self.contexts[session]) + anchor for session, anchor in zip(sessions, anchor_ids, strict=True)]
        return DraftProposals.of([DraftProposal(torch.tensor([[total]]), torch.zeros(1, 1)) for total in sums])


def rows_of(*parts: tuple[int, int, int]) -> ContextRows:
    """(session, start, count) parts, whose tokens say whose they are and where."""
    tokens = [100 * session + at for session, start, count in parts for at in range(start, start + count)]
    columns = np.array(parts, dtype=np.int64).reshape(-1, 3).T
    return ContextRows(*columns, token_ids=np.array(tokens, dtype=np.int64))


class DraftContextsMachine(RuleBasedStateMachine):
    """Open, extend, propose and close in any order, with too little room and a method that fails now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.method = Recorder()
        self.contexts = DraftContexts(self.method, MAX_ROWS)
        self.known: dict[int, list[int]] = {}

    @rule(
        parts=st.lists(st.tuples(KEYS, st.integers(0, 12), st.integers(1, 12), st.booleans()), min_size=1, max_size=4)
    )
    def extend(self, parts):
        """Rows of several sessions at once, some of them in parts that follow each other."""
        wanted, expected = [], {}
        ends: dict[int, int] = {}
        for key, start, count, is_next in parts:
            held = self.known.get(key, [])
            start = ends.get(key, len(held)) if is_next else start
            wanted.append((key, start, count))
            ends[key] = start + count
            if key in expected:
                continue
            new = start + count - len(held)
            if start > len(held):
                expected[key] = Refusal.GAP
            elif new > MAX_ROWS - sum(map(len, self.known.values())):
                expected[key] = Refusal.NO_ROOM
                self.known.pop(key, None)
            elif new > 0:
                self.known[key] = [100 * key + at for at in range(start + count)]
        assert self.contexts.extend(rows_of(*wanted)) == expected

    @rule(key=KEYS)
    def close(self, key):
        self.contexts.close([key])
        self.known.pop(key, None)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def propose(self, data):
        keys = data.draw(st.lists(st.sampled_from(sorted(self.known)), unique=True, min_size=1))
        drafts = self.contexts.propose(keys, list(keys), [1] * len(keys), 1, [Draw()] * len(keys))
        assert [int(draft.candidate_ids) for draft in drafts] == [sum(self.known[key]) + key for key in keys]

    @precondition(lambda self: self.known)
    @rule(data=st.data(), fault=st.sampled_from([RuntimeError, torch.OutOfMemoryError]))
    def fail_to_propose(self, data, fault):
        keys = data.draw(st.lists(st.sampled_from(sorted(self.known)), unique=True, min_size=1))
        self.method.fault = fault
        with pytest.raises(fault):
            self.contexts.propose(keys, list(keys), [1] * len(keys), 1, [Draw()] * len(keys))
        self.method.fault = None
        for key in keys:
            del self.known[key]

    @rule(keys=st.lists(KEYS, unique=True, min_size=1), fault=st.sampled_from([RuntimeError, torch.OutOfMemoryError]))
    def fail_to_extend(self, keys, fault):
        if sum(map(len, self.known.values())) + len(keys) > MAX_ROWS:
            return
        self.method.fault = fault
        faults = self.contexts.extend(rows_of(*((key, len(self.known.get(key, [])), 1) for key in keys)))
        self.method.fault = None
        assert faults.keys() == set(keys)
        for found in faults.values():
            assert found is Refusal.NO_ROOM if fault is torch.OutOfMemoryError else isinstance(found, fault)
        for key in keys:
            self.known.pop(key, None)

    @invariant()
    def everyone_holds_what_they_were_given_and_nobody_else_is_there(self):
        assert len(self.contexts) == len(self.known) == len(self.method.contexts)
        assert self.contexts.num_rows == sum(map(len, self.known.values())) <= MAX_ROWS
        assert self.contexts.context_lens(np.arange(6)).tolist() == [len(self.known.get(key, [])) for key in range(6)]
        assert sorted(self.method.contexts.values()) == sorted(self.known.values())


TestDraftContexts = DraftContextsMachine.TestCase
TestDraftContexts.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
