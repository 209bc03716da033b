"""The owner of a drafter's sessions, against a model of what each context holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dflash_ray.models.block_drafter import DraftProposal
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_contexts import DraftContexts, Extension

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

    def extend(self, session, start, features, token_ids) -> None:
        context = self.contexts[session]
        assert start <= len(context), "a gap reached the method"
        self._fail()
        context.extend(token_ids[len(context) - start :])

    def propose(self, sessions, anchor_ids, num_draft_tokens, num_candidates, draws, tree_width=1):
        self._fail()
        sums = [sum(self.contexts[session]) + anchor for session, anchor in zip(sessions, anchor_ids, strict=True)]
        return [DraftProposal(torch.tensor([[total]]), torch.zeros(1, 1)) for total in sums]


class DraftContextsMachine(RuleBasedStateMachine):
    """Open, extend, propose and close in any order, with too little room and a method that fails now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.method = Recorder()
        self.contexts: DraftContexts[int] = DraftContexts(self.method, MAX_ROWS)
        self.known: dict[int, list[int]] = {}

    @rule(key=KEYS, start=st.integers(0, 12), count=st.integers(0, 12), is_next=st.booleans())
    def extend(self, key, start, count, is_next):
        held = self.known.get(key, [])
        start = len(held) if is_next else start
        tokens = [100 * key + at for at in range(start, start + count)]
        room = MAX_ROWS - sum(map(len, self.known.values()))
        got = self.contexts.extend(key, start, None, tokens)
        new = start + count - len(held)
        if start > len(held):
            assert got is Extension.GAP
        elif new > room:
            assert got is Extension.REFUSED
            self.known.pop(key, None)
        else:
            assert got is Extension.HELD
            if new > 0:
                self.known[key] = [100 * key + at for at in range(start + count)]

    @rule(key=KEYS)
    def close(self, key):
        self.contexts.close(key)
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

    @rule(key=KEYS, fault=st.sampled_from([RuntimeError, torch.OutOfMemoryError]))
    def fail_to_extend(self, key, fault):
        start = len(self.known.get(key, []))
        if sum(map(len, self.known.values())) == MAX_ROWS:
            return
        self.method.fault = fault
        if fault is torch.OutOfMemoryError:
            assert self.contexts.extend(key, start, None, [1]) is Extension.REFUSED
        else:
            with pytest.raises(fault):
                self.contexts.extend(key, start, None, [1])
        self.method.fault = None
        self.known.pop(key, None)

    @rule(parity=st.integers(0, 1))
    def close_all(self, parity):
        self.contexts.close_all(lambda key: key % 2 == parity)
        self.known = {key: rows for key, rows in self.known.items() if key % 2 != parity}

    @invariant()
    def everyone_holds_what_they_were_given_and_nobody_else_is_there(self):
        assert len(self.contexts) == len(self.known) == len(self.method.contexts)
        assert self.contexts.num_rows == sum(map(len, self.known.values())) <= MAX_ROWS
        assert all(self.contexts.context_len(key) == len(self.known.get(key, [])) for key in range(6))
        assert sorted(self.method.contexts.values()) == sorted(self.known.values())


TestDraftContexts = DraftContextsMachine.TestCase
TestDraftContexts.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
