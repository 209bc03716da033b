"""A replica's sessions: tokens in pieces, gaps, room that runs out, faults, and streams that end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
import torch

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.arrivals import Arrivals
from dflash_ray.drafter.drafts import Drafts
from dflash_ray.drafter.ngram import NgramMethod
from dflash_ray.drafter.servicer import DrafterServicer
from dflash_ray.drafter.sessions import DraftSessions
from dflash_ray.observability.metrics import DrafterMetrics
from dflash_ray.pb import drafter_pb2, drafter_pb2_grpc
from dflash_ray.rpc.channel import new_server, open_channel, start_server
from tests.toy import drafts_of

MIB = 1 << 20


def request(
    rows: dict[int, tuple[int, int]] | None = None, committed: dict[int, int] | None = None, close=(), **columns
) -> drafter_pb2.DraftRequest:
    """Tokens by sequence, as (start, count), and proposals by committed lengths."""
    rows, wanted = rows or {}, committed or {}
    count = len(wanted)
    defaults = {
        "max_wait_ms": 20_000,
        "epoch": 1,
        "close": close,
        "token_sequence_ids": list(rows),
        "token_starts": [start for start, _ in rows.values()],
        "num_tokens": [size for _, size in rows.values()],
        "token_ids": [(start + at) % 5 for start, size in rows.values() for at in range(size)],
        "sequence_ids": list(wanted),
        "committed_lens": list(wanted.values()),
        "anchor_token_ids": [(length - 1) % 5 for length in wanted.values()],
        "num_draft_tokens": [3] * count,
        "temperatures": [0.0] * count,
        "seeds": [0] * count,
        "wants_distributions": [False] * count,
    }
    return drafter_pb2.DraftRequest(**(defaults | columns))


def missing(reply: drafter_pb2.DraftReply) -> dict[int, tuple[int, str]]:
    names = [drafter_pb2.MissingReason.Name(reason).removeprefix("MISSING_REASON_") for reason in reply.missing_reasons]
    return dict(zip(reply.missing_ids, zip(reply.have_lens, names, strict=True), strict=True))


def drafted(reply: drafter_pb2.DraftReply) -> dict[int, list[int]]:
    return drafts_of(reply.blocks)


class Replica:
    """The parts of a replica behind its gRPC service."""

    def __init__(self, method: NgramMethod, max_context_tokens: int = 100) -> None:
        self.sessions = DraftSessions(method, max_context_tokens)
        self._drafts = Drafts(
            self.sessions, Arrivals(), None, Watchdog(600, "a draft pass"), on_busy=lambda start, end: None
        )
        self.close = self._drafts.close

    async def answer(self, message: drafter_pb2.DraftRequest, stream: int = 0) -> drafter_pb2.DraftReply:
        return await self._drafts.answer(stream, message)

    async def settle(self) -> None:
        """Returns when the compute thread has done all that it was given."""
        await self._drafts._run(lambda: None)

    async def drop_stream(self, stream: int) -> None:
        self._drafts.drop_stream(stream)
        await self.settle()


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    replica = Replica(NgramMethod())
    yield replica
    await replica.close()


async def test_tokens_come_in_several_requests_and_are_drafted_from_later(replica):
    for start in (0, 10, 20):
        reply = await replica.answer(request({4: (start, 10)}))
        assert not drafted(reply) and not missing(reply)
    assert drafted(await replica.answer(request(committed={4: 31}))) == {4: [1, 2, 3]}


async def test_tokens_behind_a_gap_are_not_kept(replica):
    await replica.answer(request({4: (0, 10)}))
    await replica.answer(request({4: (12, 5), 7: (3, 5), 8: (0, 5)}))
    lacking = await replica.answer(request(committed={4: 18, 7: 9, 8: 6}))
    assert missing(lacking) == {4: (10, "LOST"), 7: (0, "LOST")} and drafted(lacking).keys() == {8}
    assert drafted(await replica.answer(request({4: (8, 14)}, {4: 23}))).keys() == {4}


async def test_who_finds_no_room_is_refused_and_nobody_is_dropped_for_it(replica):
    await replica.answer(request({1: (0, 60), 2: (0, 30)}))
    reply = await replica.answer(request({3: (0, 25)}, {1: 61, 2: 31, 3: 26}))
    assert missing(reply) == {3: (0, "REFUSED")} and drafted(reply).keys() == {1, 2}
    assert replica.sessions.num_context_rows == 90
    # A session that grows past the room is the one that goes.
    reply = await replica.answer(request({2: (30, 20)}, {1: 61, 2: 51}))
    assert missing(reply) == {2: (0, "REFUSED")} and drafted(reply).keys() == {1}
    assert drafted(await replica.answer(request({3: (0, 25)}, {3: 26}))).keys() == {3}


async def test_a_proposal_that_the_sequence_has_passed_leaves_its_session_as_it_is(replica):
    await replica.answer(request({1: (0, 60)}))
    assert missing(await replica.answer(request(committed={1: 40}))) == {1: (60, "PASSED")}
    assert drafted(await replica.answer(request(committed={1: 61}))).keys() == {1}


async def test_closing_makes_room_in_the_same_request(replica):
    await replica.answer(request({1: (0, 90)}))
    assert drafted(await replica.answer(request({2: (0, 90)}, {2: 91}, close=[1, 99]))).keys() == {2}
    assert len(replica.sessions) == 1


async def test_sequences_of_two_streams_are_two(replica):
    await replica.answer(request({1: (0, 10)}, {1: 11}), stream=0)
    await replica.answer(request({1: (0, 20)}, {1: 21}), stream=1)
    await replica.drop_stream(0)
    assert replica.sessions.num_context_rows == 20
    assert missing(await replica.answer(request(committed={1: 11}), stream=0)) == {1: (0, "LOST")}


async def test_a_drafter_that_reads_tokens_refuses_to_fetch_features(replica):
    with pytest.raises(ValueError, match="open: "):
        await replica.answer(request(open=[1], open_lens=[5]))


class Ahead(NgramMethod):
    """Says what it was asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def extend(self, *args):
        self.calls.append("extend")
        super().extend(*args)

    def catch_up(self):
        self.calls.append("catch up")
        raise RuntimeError

    def propose(self, *args):
        self.calls.append("propose")
        return super().propose(*args)


async def test_rows_are_worked_on_before_a_draft_is_asked_for_and_a_fault_there_costs_nothing():
    method = Ahead()
    replica = Replica(method)
    await replica.answer(request({1: (0, 10)}))
    while method.calls[-1:] != ["catch up"]:
        await asyncio.sleep(0.001)
    assert drafted(await replica.answer(request(committed={1: 11}))).keys() == {1}
    assert method.calls == ["extend", "catch up", "propose"]
    await replica.close()


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


@pytest.mark.parametrize(("fault", "reason"), [(RuntimeError, "LOST"), (torch.OutOfMemoryError, "REFUSED")])
@pytest.mark.parametrize("place", ["extend", "propose"])
async def test_a_session_lost_to_a_fault_is_missing_and_the_others_stay(place, fault, reason):
    method = Broken()
    replica = Replica(method)
    await replica.answer(request({1: (0, 10), 2: (0, 10)}, {1: 11, 2: 11}))
    method.fails_at, method.fault = place, fault
    rows = {1: (10, 5)} if place == "extend" else {}
    assert missing(await replica.answer(request(rows, {1: 16 if rows else 11}))) == {1: (0, reason)}
    method.fails_at = ""
    assert drafted(await replica.answer(request({1: (0, 10)}, {1: 11, 2: 11}))).keys() == {1, 2}
    await replica.close()


@contextlib.asynccontextmanager
async def served(method, max_context_tokens: int = 100_000, max_message_bytes: int = MIB):
    servicer = DrafterServicer("d", method, max_context_tokens, MIB, Watchdog(600, "a draft pass"), DrafterMetrics())
    server = new_server(max_message_bytes)
    drafter_pb2_grpc.add_DrafterServicer_to_server(servicer, server)
    running = await start_server(server, [], "127.0.0.1", 0)
    try:
        yield servicer, f"127.0.0.1:{running.port}"
    finally:
        await running.stop()
        await servicer.close()


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
        (request({1: (0, 3)}, token_ids=[1]), "token_ids"),
        (request({1: (0, 3)}, token_starts=[]), "token_starts"),
        (request(open=[1]), "open_lens"),
        (request(open=[1], open_lens=[1]), "open"),
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
        await answer_of(stays, request({1: (0, 10)}, {1: 11}))
        async with stream_to(address) as leaves:
            await answer_of(leaves, request({1: (0, 30), 2: (0, 5)}, {1: 31, 2: 6}))
            assert "live_sessions 3.0" in servicer.render_metrics()
        # Work on the one compute thread is in order, so an answer that saw the stream's end is enough.
        while len(servicer._sessions) > 1:
            await answer_of(stays, request(committed={1: 11}))
        assert drafted(await answer_of(stays, request(committed={1: 11}))).keys() == {1}
