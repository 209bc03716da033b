"""Drafters fetch context features over gRPC: what they get, in which order, and how they learn that nothing comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
import torch

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.models.context_features import FEATURE_PIECE_BYTES, decode_response, rows_of
from dflash_ray.pb import target_pb2
from dflash_ray.rpc.channel import open_channel
from dflash_ray.rpc.target_service import call_features
from tests.feature_groups import FINGERPRINT, LIMIT, PIECE_ROWS, WIDTH, FeatureGroup, feature_group, truth


class Reader:
    """A drafter's end of the stream, which keeps what it was sent."""

    def __init__(self, call) -> None:
        self.call = call
        self.rows: dict[int, list[tuple[int, torch.Tensor]]] = {}
        self.ends: dict[int, str] = {}
        self.sizes: list[int] = []

    async def subscribe(self, number: int, sequence_id: int, start: int = 0, epoch: int = 1, step_id: int = 0) -> None:
        message = target_pb2.Subscribe(
            epoch=epoch, step_id=step_id, subscription_ids=[number], sequence_ids=[sequence_id], starts=[start]
        )
        await self.call.write(target_pb2.FeaturesRequest(subscribe=message))

    async def unsubscribe(self, *numbers: int) -> None:
        message = target_pb2.Unsubscribe(subscription_ids=numbers)
        await self.call.write(target_pb2.FeaturesRequest(unsubscribe=message))

    async def take(self) -> None:
        """Takes one message."""
        async with asyncio.timeout(30):
            response = await self.call.read()
        if response == grpc.aio.EOF:
            raise ConnectionError(await self.call.details())
        response, data = decode_response(response)
        if response.WhichOneof("message") == "end":
            for number, reason in zip(response.end.subscription_ids, response.end.reasons, strict=True):
                name = target_pb2.FeaturesEndReason.Name(reason)
                self.ends[number] = name.removeprefix("FEATURES_END_REASON_")
            return
        features = response.features
        self.sizes.append(len(data))
        rows, at = rows_of(features, data, WIDTH).tensor(), 0
        for number, start, count in zip(features.subscription_ids, features.starts, features.num_rows, strict=True):
            assert count > 0
            self.rows.setdefault(number, []).append((start, rows[at : at + count]))
            at += count

    async def until(self, number: int, end: int) -> torch.Tensor:
        """The rows of a subscription, without gaps, once those before position `end` have come."""
        while (parts := self.rows.get(number, [])) == [] or parts[-1][0] + len(parts[-1][1]) < end:
            await self.take()
        at = parts[0][0]
        for start, rows in parts:
            assert start == at, "rows come once and in order"
            at += len(rows)
        return torch.cat([rows for _, rows in parts])

    async def until_over(self, number: int) -> str:
        while number not in self.ends:
            await self.take()
        return self.ends[number]


@contextlib.asynccontextmanager
async def drafter(address: str, **hello) -> AsyncIterator[Reader]:
    async with open_channel(address, LIMIT) as channel:
        call = call_features(channel)
        values = {"protocol_version": PROTOCOL_VERSION, "drafter_id": "d", "fingerprint": FINGERPRINT}
        await call.write(target_pb2.FeaturesRequest(hello=target_pb2.FeaturesHello(**(values | hello))))
        reply = await call.read()
        assert reply != grpc.aio.EOF and decode_response(reply)[0].hello.target_id == "t"
        yield Reader(call)
        call.cancel()


@pytest.fixture
async def group() -> AsyncIterator[FeatureGroup]:
    async with feature_group() as group:
        yield group


async def test_rows_come_in_order_as_they_are_computed_those_of_a_prompt_while_it_is_prefilled(group):
    group.receive(opens=[7])
    async with drafter(group.address) as reader:
        await reader.subscribe(1, 7)
        for end in (10, 20, 23):
            group.step(s7=end)
            assert torch.equal(await reader.until(1, end), truth(7, 0, end))


async def test_a_subscription_from_an_earlier_row_gives_the_rows_that_came_before(group):
    group.receive(opens=[7])
    group.compute(s7=300)
    async with drafter(group.address) as reader:
        await reader.subscribe(1, 7)
        first = await reader.until(1, 300)
        await reader.subscribe(2, 7, start=40)
        group.step(s7=310)
        assert torch.equal(await reader.until(2, 310), torch.cat([first[40:], truth(7, 300, 10)]))
        assert torch.equal(await reader.until(1, 310), truth(7, 0, 310))


async def test_every_message_is_bounded_and_rows_of_many_sequences_share_one(group):
    ids = list(range(1, 41))
    group.receive(opens=ids)
    async with drafter(group.address) as reader:
        for number in ids:
            await reader.subscribe(number, number)
        await reader.subscribe(99, 99)
        await reader.until_over(99)  # the stream is in order: all others are there
        group.compute(**({f"s{number}": 3 for number in ids} | {"s1": 4 * PIECE_ROWS}))
        for number in ids:
            end = 4 * PIECE_ROWS if number == 1 else 3
            assert torch.equal(await reader.until(number, end), truth(number, 0, end))
        assert max(reader.sizes) <= FEATURE_PIECE_BYTES
        assert len(reader.sizes) <= 6, "39 sequences with 3 rows each are no 39 messages"


async def test_a_long_replay_does_not_hold_up_the_rows_of_others(group):
    group.receive(opens=[1, 2])
    group.compute(s1=100 * PIECE_ROWS)
    async with drafter(group.address) as reader:
        await reader.subscribe(1, 1)
        await reader.until(1, PIECE_ROWS)
        await reader.subscribe(2, 2)
        group.step(s2=5)
        await reader.until(2, 5)
        assert reader.rows[1][-1][0] < 90 * PIECE_ROWS


async def test_a_reader_that_takes_nothing_costs_nothing_and_holds_nobody_up(group):
    group.receive(opens=[1])
    async with drafter(group.address) as slow, drafter(group.address) as quick:
        await slow.subscribe(1, 1)
        await quick.subscribe(1, 1)
        total = 80 * PIECE_ROWS  # 20 MiB
        for end in range(PIECE_ROWS, total + 1, PIECE_ROWS):
            group.step(s1=end)
            await quick.until(1, end)
        assert group.num_read < total + 40 * PIECE_ROWS, "what the slow one has not taken is not read for it"
        assert torch.equal(await slow.until(1, total), truth(1, 0, total))


async def test_nothing_is_read_for_sequences_that_nobody_subscribed_to(group):
    group.receive(opens=[1, 2])
    async with drafter(group.address) as reader:
        await reader.subscribe(1, 1)
        group.step(s1=10, s2=10_000)
        await reader.until(1, 10)
        assert group.num_read == 10
        await reader.unsubscribe(1)
        await reader.subscribe(2, 99)
        await reader.until_over(2)  # the stream is in order
        await reader.subscribe(3, 2, start=9_999)
        group.step(s1=20, s2=10_000)
        await reader.until(3, 10_000)
        assert group.num_read == 11 and len(reader.rows[1]) == 1


async def test_a_subscription_may_come_before_the_step_that_opens_its_sequence(group):
    async with drafter(group.address) as reader:
        await reader.subscribe(1, 7, step_id=2)
        await reader.subscribe(2, 8, step_id=2)
        await reader.subscribe(3, 9, step_id=1)
        group.receive(opens=[9])
        group.compute(s9=5)
        await reader.until(3, 5)
        assert not reader.ends
        group.receive(opens=[7])
        assert await reader.until_over(2) == "UNKNOWN"
        group.compute(s7=4)
        assert torch.equal(await reader.until(1, 4), truth(7, 0, 4))


async def test_who_subscribes_to_a_sequence_that_is_not_there_is_told_so(group):
    group.receive(opens=[1], wants_features=False)
    async with drafter(group.address) as reader:
        await reader.subscribe(1, 1)
        await reader.subscribe(2, 99)
        assert await reader.until_over(1) == await reader.until_over(2) == "UNKNOWN"


async def test_a_subscription_ends_with_its_sequence_and_one_that_is_opened_anew_is_another(group):
    group.receive(opens=[1])
    group.compute(s1=10)
    async with drafter(group.address) as reader:
        await reader.subscribe(1, 1)
        await reader.until(1, 10)
        before = group.receive()
        group.receive(opens=[1], closes=[1])
        assert await reader.until_over(1) == "CLOSED"
        await reader.subscribe(2, 1)
        group.compute(before, s1=14)  # of the step that ran when the sequence was closed
        group.compute(s1=3)
        assert torch.equal(await reader.until(2, 3), truth(1, 0, 3))


async def test_another_epoch_ends_all_subscriptions_and_an_old_one_gets_none(group):
    group.receive(opens=[1])
    group.compute(s1=10)
    async with drafter(group.address) as reader:
        await reader.subscribe(1, 1)
        await reader.subscribe(2, 1, step_id=50)
        await reader.until(1, 10)
        group.lead()
        assert await reader.until_over(1) == await reader.until_over(2) == "SUPERSEDED"
        group.receive(opens=[1])
        group.streams.publish(1, group.step_id + 5, [1], np.array([9]))  # of a step that ran when the epoch ended
        group.compute(s1=4)
        await reader.subscribe(3, 1, epoch=1)
        assert await reader.until_over(3) == "SUPERSEDED"
        await reader.subscribe(4, 1, epoch=2)
        assert torch.equal(await reader.until(4, 4), truth(1, 0, 4))


async def test_a_stream_that_ends_takes_its_subscriptions_with_it(group):
    group.receive(opens=[1])
    async with drafter(group.address) as stays:
        async with drafter(group.address) as leaves:
            await leaves.subscribe(1, 1)
            group.step(s1=5)
            await leaves.until(1, 5)
        await stays.subscribe(1, 1)
        await stays.until(1, 5)
        async with asyncio.timeout(30):
            while len(group.streams._streams) > 1:
                await asyncio.sleep(0.01)
        (stream,) = group.streams._streams
        assert len(stream.subscriptions) == 1


@pytest.mark.parametrize(
    ("hello", "fault"),
    [
        ({"fingerprint": "another fc"}, "fingerprint 'another fc' of drafter d is not .*'fc of the drafter'"),
        ({"protocol_version": PROTOCOL_VERSION - 1}, f"protocol_version {PROTOCOL_VERSION - 1} is not"),
    ],
)
async def test_a_hello_that_does_not_fit_is_refused_by_name(group, hello, fault):
    with pytest.raises(grpc.aio.AioRpcError, match=fault) as raised:
        async with drafter(group.address, **hello):
            pass
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_the_first_message_must_be_a_hello(group):
    async with open_channel(group.address, LIMIT) as channel:
        call = call_features(channel)
        await call.write(target_pb2.FeaturesRequest(subscribe=target_pb2.Subscribe()))
        with pytest.raises(grpc.aio.AioRpcError, match="hello"):
            await call.read()


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"sequence_ids": [], "starts": [0], "subscription_ids": [5]}, "sequence_ids"),
        ({"sequence_ids": [1], "starts": [0, 0], "subscription_ids": [5]}, "starts"),
        ({"sequence_ids": [1, 1], "starts": [0, 0], "subscription_ids": [5, 5]}, "subscription_ids"),
        ({"sequence_ids": [1], "starts": [0], "subscription_ids": [1]}, "subscription_ids"),
    ],
)
async def test_a_malformed_subscription_gets_a_status_that_names_the_column(group, columns, named):
    group.receive(opens=[1])
    async with drafter(group.address) as reader:
        await reader.subscribe(1, 1)
        await reader.call.write(target_pb2.FeaturesRequest(subscribe=target_pb2.Subscribe(epoch=1, **columns)))
        with pytest.raises(grpc.aio.AioRpcError, match=named) as raised:
            await reader.take()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
