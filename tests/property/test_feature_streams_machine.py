"""Subscriptions to features of a target whose steps are read before they are computed, and whose routers change."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dflash_ray.models.context_features import PackedRows, decode_response, pack, rows_of
from dflash_ray.pb import target_pb2
from dflash_ray.target_group.feature_streams import FeatureStreams, _Stream, _Wanted
from tests.feature_groups import subscribed_ids

PIECE_ROWS = 4
IDS = st.integers(1, 2)
SUPERSEDED = target_pb2.FEATURES_END_REASON_SUPERSEDED


class FeatureStreamsMachine(RuleBasedStateMachine):
    """Rows say whose they are: the number of the sequence's opening, and their position."""

    @initialize()
    def start(self):
        self.streams = FeatureStreams(self.read, PIECE_ROWS, "t", "")
        self.epoch = self.step_id = self.num_openings = self.num_subscriptions = 0
        self.opened: dict[int, int] = {}  # sequence id -> its opening, as far as steps were read
        self.computed: dict[int, list[int]] = {}  # sequence id -> [its opening, rows], as far as they were computed
        self.steps: list[tuple[int, int, dict[int, int | None]]] = []  # read and not computed
        self.drafters = [_Stream(self.streams._sequences), _Stream(self.streams._sequences)]
        self.streams._streams.update(self.drafters)
        self.known: dict[int, tuple[_Stream, int | None, int]] = {}  # subscription -> stream, opening, next row
        self.ended: set[int] = set()
        self.another_router_leads()

    def read(self, sequence_ids, starts, counts) -> PackedRows:
        rows = []
        for sequence_id, start, count in zip(sequence_ids, starts, counts, strict=True):
            opening, num_rows = self.computed[sequence_id]
            assert start + count <= num_rows, "rows are read that are not there"
            rows += [[opening, at] for at in range(start, start + count)]
        return pack(torch.tensor(rows, dtype=torch.float32))

    @rule()
    def another_router_leads(self):
        """Steps that were read may still be computed; the other router counts its own from 1."""
        self.epoch += 1
        self.step_id = 0
        self.opened.clear()
        self.streams.lead(self.epoch)
        for number, (stream, _, at) in self.known.items():
            self.known[number] = (stream, None, at)

    @rule(opens=st.sets(IDS), closes=st.sets(IDS, max_size=1))
    def step_is_read(self, opens, closes):
        self.step_id += 1
        step = target_pb2.Step(step_id=self.step_id, close=closes)
        changes: dict[int, int | None] = dict.fromkeys(closes)
        for sequence_id in closes:
            self.opened.pop(sequence_id, None)
        for sequence_id in opens:
            step.open.add(sequence_id=sequence_id, wants_features=True)
            self.num_openings += 1
            self.opened[sequence_id] = changes[sequence_id] = self.num_openings
        self.streams.receive(step)
        self.steps.append((self.epoch, self.step_id, changes))

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def step_is_computed(self, data):
        epoch, step_id, changes = self.steps.pop(0)
        for sequence_id, opening in changes.items():
            self.computed.pop(sequence_id, None)
            if opening is not None:
                self.computed[sequence_id] = [opening, 0]
        for sequence_id in data.draw(st.sets(st.sampled_from(sorted(self.computed)))) if self.computed else ():
            self.computed[sequence_id][1] += data.draw(st.integers(1, 9))
        ids = list(self.computed)
        num_rows = np.array([self.computed[sequence_id][1] for sequence_id in ids], dtype=np.int64)
        self.streams.publish(epoch, step_id, ids, num_rows)

    @rule(
        which=st.integers(0, 1),
        sequence_id=IDS,
        start=st.integers(0, 6),
        ahead=st.integers(0, 1),
        back=st.integers(0, 1),
    )
    def subscribe(self, which, sequence_id, start, ahead, back):
        self.num_subscriptions += 1
        wanted = _Wanted(self.epoch - back, self.step_id + ahead, sequence_id, start)
        stream, number = self.drafters[which], self.num_subscriptions
        self.streams._subscribe(stream, number, wanted)
        self.known[number] = (stream, None, start)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def take(self, data):
        """A drafter takes one message."""
        stream = data.draw(st.sampled_from(self.drafters))
        response = self.streams._next(stream)
        if response is None:
            assert not stream.subscriptions.is_behind and not stream.ends
            return
        response, data = decode_response(response)
        if response.WhichOneof("message") == "end":
            for number in response.end.subscription_ids:
                assert number in self.known and number not in self.ended, "a subscription ends once"
                self.ended.add(number)
        else:
            self.check_rows(stream, response.features, data)

    def check_rows(self, stream, features, data):
        rows, at = rows_of(features, data, 2).tensor().tolist(), 0
        assert 0 < len(rows) <= PIECE_ROWS
        for number, start, count in zip(features.subscription_ids, features.starts, features.num_rows, strict=True):
            owner, opening, next_row = self.known[number]
            assert owner is stream and number not in self.ended and start == next_row, "rows come once and in order"
            openings = {int(row[0]) for row in rows[at : at + count]}
            assert [int(row[1]) for row in rows[at : at + count]] == list(range(start, start + count))
            assert len(openings) == 1 and openings <= {opening if opening is not None else openings.copy().pop()}
            assert openings <= set(self.opened.values()), "nothing is sent of a sequence that is closed"
            self.known[number] = (stream, openings.pop(), start + count)
            at += count

    @invariant()
    def what_is_subscribed_to_is_open(self):
        if not hasattr(self, "streams"):
            return
        assert subscribed_ids(self.streams) <= set(self.opened)

    def teardown(self):
        """Everything that is there comes, and whoever gets nothing any more is told."""
        if not hasattr(self, "streams"):
            return
        self.step_is_read(set(), set())
        for stream in self.drafters:
            while (response := self.streams._next(stream)) is not None:
                response, data = decode_response(response)
                if response.WhichOneof("message") == "features":
                    self.check_rows(stream, response.features, data)
                else:
                    self.ended.update(response.end.subscription_ids)
        alive = {number for stream in self.drafters for number in stream.subscriptions}
        waiting = {number for stream in self.drafters for number in stream.waiting}
        assert not waiting and alive | self.ended == set(self.known) and not alive & self.ended


TestFeatureStreams = FeatureStreamsMachine.TestCase
TestFeatureStreams.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
