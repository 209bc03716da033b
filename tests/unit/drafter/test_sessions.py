"""A replica's sessions: contexts in pieces, gaps, room that runs out, faults, and streams that end."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
import torch

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.ngram import NgramMethod
from dflash_ray.drafter.servicer import DrafterServicer
from dflash_ray.drafter.sessions import DraftSessions
from dflash_ray.observability.metrics import DrafterMetrics
from dflash_ray.pb import common_pb2, drafter_pb2, drafter_pb2_grpc
from dflash_ray.rpc.channel import new_server, open_channel, start_server

MIB = 1 << 20


def rows(sequence_id: int, start: int, count: int) -> common_pb2.ContextFeatures:
    tokens = [(start + at) % 5 for at in range(count)]
    return common_pb2.ContextFeatures(sequence_id=sequence_id, start=start, num_rows=count, token_ids=tokens)


def request(contexts=(), committed: dict[int, int] | None = None, close=()) -> drafter_pb2.DraftRequest:
    """Contexts, and proposals for sequences by their committed lengths."""
    wanted = committed or {}
    count = len(wanted)
    return drafter_pb2.DraftRequest(
        close=close,
        contexts=contexts,
        sequence_ids=list(wanted),
        epochs=[1] * count,
        committed_lens=list(wanted.values()),
        anchor_token_ids=[(length - 1) % 5 for length in wanted.values()],
        num_draft_tokens=[3] * count,
        temperatures=[0.0] * count,
        seeds=[0] * count,
        wants_distributions=[False] * count,
    )


def missing(reply: drafter_pb2.DraftReply) -> dict[int, tuple[int, bool]]:
    return {one.sequence_id: (one.have_len, one.is_refused) for one in reply.missing}


def drafted(reply: drafter_pb2.DraftReply) -> dict[int, list[int]]:
    return {block.sequence_id: list(block.candidate_ids) for block in reply.blocks}


@pytest.fixture
def sessions() -> DraftSessions:
    return DraftSessions(NgramMethod(), max_context_tokens=100)


def test_contexts_alone_are_acknowledged_and_drafted_from_later(sessions):
    for start in (0, 10, 20):
        reply = sessions.answer(0, request([rows(4, start, 10)]))
        assert not reply.blocks and not reply.missing
    assert drafted(sessions.answer(0, request(committed={4: 31}))) == {4: [1, 2, 3]}


def test_a_gap_is_answered_though_no_draft_was_asked_for(sessions):
    sessions.answer(0, request([rows(4, 0, 10)]))
    reply = sessions.answer(0, request([rows(4, 12, 5), rows(4, 17, 5), rows(7, 3, 5), rows(8, 0, 5)]))
    assert missing(reply) == {4: (10, False), 7: (0, False)}
    assert missing(sessions.answer(0, request(committed={4: 23}))) == {4: (10, False)}
    assert drafted(sessions.answer(0, request([rows(4, 8, 14)], {4: 23}))).keys() == {4}


def test_who_finds_no_room_is_refused_and_nobody_is_dropped_for_it(sessions):
    sessions.answer(0, request([rows(1, 0, 60), rows(2, 0, 30)]))
    reply = sessions.answer(0, request([rows(3, 0, 20), rows(3, 20, 5)], {1: 61, 2: 31, 3: 26}))
    assert missing(reply) == {3: (0, True)} and drafted(reply).keys() == {1, 2}
    assert sessions.num_context_rows == 90
    # A session that grows past the room is the one that goes.
    reply = sessions.answer(0, request([rows(2, 30, 20)], {1: 61, 2: 51}))
    assert missing(reply) == {2: (0, True)} and drafted(reply).keys() == {1}
    assert drafted(sessions.answer(0, request([rows(3, 0, 25)], {3: 26}))).keys() == {3}


def test_a_context_of_another_past_is_dropped(sessions):
    sessions.answer(0, request([rows(1, 0, 60)]))
    assert missing(sessions.answer(0, request(committed={1: 40}))) == {1: (0, False)}
    assert len(sessions) == 0


def test_closing_makes_room_in_the_same_request(sessions):
    sessions.answer(0, request([rows(1, 0, 90)]))
    assert not sessions.answer(0, request([rows(2, 0, 90)], close=[1, 99])).missing
    assert len(sessions) == 1


def test_sequences_of_two_streams_are_two(sessions):
    sessions.answer(0, request([rows(1, 0, 10)]))
    sessions.answer(1, request([rows(1, 0, 20)]))
    sessions.drop_stream(0)
    assert sessions.num_context_rows == 20
    assert missing(sessions.answer(0, request(committed={1: 11}))) == {1: (0, False)}


class Broken(NgramMethod):
    """Fails where it is told to."""

    fails_at = ""
    fault: type[Exception] = RuntimeError

    def extend(self, *args):
        if self.fails_at == "extend":
            raise self.fault
        super().extend(*args)

    def propose(self, *args):
        if self.fails_at == "propose":
            raise self.fault
        return super().propose(*args)


@pytest.mark.parametrize(("fault", "is_refused"), [(RuntimeError, False), (torch.OutOfMemoryError, True)])
@pytest.mark.parametrize("place", ["extend", "propose"])
def test_a_session_lost_to_a_fault_is_missing_and_the_others_stay(place, fault, is_refused):
    method = Broken()
    sessions = DraftSessions(method, 100)
    sessions.answer(0, request([rows(1, 0, 10), rows(2, 0, 10)]))
    method.fails_at, method.fault = place, fault
    contexts = [rows(1, 10, 5)] if place == "extend" else []
    assert missing(sessions.answer(0, request(contexts, {1: 16 if contexts else 11}))) == {1: (0, is_refused)}
    method.fails_at = ""
    assert drafted(sessions.answer(0, request([rows(1, 0, 10)], {1: 11, 2: 11}))).keys() == {1, 2}


@contextlib.asynccontextmanager
async def served(method, max_context_tokens: int = 100_000, max_message_bytes: int = MIB):
    servicer = DrafterServicer("d", method, max_context_tokens, Watchdog(600, "a draft pass"), DrafterMetrics())
    server = new_server(max_message_bytes)
    drafter_pb2_grpc.add_DrafterServicer_to_server(servicer, server)
    running = await start_server(server, [], "127.0.0.1", 0)
    try:
        yield servicer, f"127.0.0.1:{running.port}"
    finally:
        await running.stop()


@contextlib.asynccontextmanager
async def stream_to(address: str) -> AsyncIterator[grpc.aio.StreamStreamCall]:
    async with open_channel(address, MIB) as channel:
        call = drafter_pb2_grpc.DrafterStub(channel).Draft()
        hello = drafter_pb2.DrafterHello(protocol_version=PROTOCOL_VERSION, router_id="r")
        await call.write(drafter_pb2.DrafterRequest(hello=hello))
        assert (await call.read()).hello.drafter_id == "d"
        yield call


async def answer_of(call, message: drafter_pb2.DraftRequest) -> drafter_pb2.DraftReply:
    await call.write(drafter_pb2.DrafterRequest(draft=message))
    return (await call.read()).drafts


def change(message: drafter_pb2.DraftRequest, name: str, value) -> drafter_pb2.DraftRequest:
    getattr(message, name)[:] = value
    return message


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (change(request(committed={1: 5}), "seeds", []), "seeds"),
        (change(request(committed={1: 5}), "committed_lens", [5, 6]), "committed_lens"),
        (change(request(committed={1: 5, 2: 5}), "sequence_ids", [1, 1]), "sequence_ids"),
        (request([common_pb2.ContextFeatures(sequence_id=1, num_rows=3, token_ids=[1])]), "token_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_malformed_request_gets_a_status_that_names_the_field(message, field):
    async with served(NgramMethod()) as (_, address), stream_to(address) as call:
        await call.write(drafter_pb2.DrafterRequest(draft=message))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in raised.value.details()


async def test_sessions_that_a_router_forgot_end_with_its_stream():
    async with served(NgramMethod()) as (servicer, address), stream_to(address) as stays:
        await answer_of(stays, request([rows(1, 0, 10)]))
        async with stream_to(address) as leaves:
            await answer_of(leaves, request([rows(1, 0, 30), rows(2, 0, 5)]))
            assert "live_sessions 3.0" in servicer.render_metrics()
        # Work on the one compute thread is in order, so an answer that saw the stream's end is enough.
        while len(servicer._sessions) > 1:
            await answer_of(stays, request())
        assert drafted(await answer_of(stays, request(committed={1: 11}))).keys() == {1}
