"""Streams of context features from target groups, one to each of those whose sequences are drafted for here."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator

import grpc

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.drafter.arrivals import Arrival, Arrivals
from dflash_ray.models.context_features import rows_of
from dflash_ray.pb import target_pb2, target_pb2_grpc
from dflash_ray.rpc.channel import open_channel

logger = logging.getLogger(__name__)
_HELLO_TIMEOUT_S = 10.0


class FeatureSource:
    """One stream. What goes wrong with it ends all its subscriptions; whoever wants rows again opens another one."""

    def __init__(
        self, address: str, hello: target_pb2.FeaturesHello, width: int, max_message_bytes: int, arrivals: Arrivals
    ) -> None:
        self.address = address
        self._hello = hello
        self._width = width
        self._max_message_bytes = max_message_bytes
        self._arrivals = arrivals
        self._numbers = itertools.count(1)
        self._by_number: dict[int, Arrival] = {}
        self._number_of: dict[Arrival, int] = {}
        self._outgoing: asyncio.Queue[target_pb2.FeaturesRequest] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())

    @property
    def is_over(self) -> bool:
        return self._task.done()

    def subscribe(self, epoch: int, step_id: int, wanted: list[tuple[Arrival, int]]) -> None:
        """Asks for the rows that sessions lack, of sequences that are open once a step is done.

        Args:
            wanted: sessions and their sequences' ids.
        """
        message = target_pb2.Subscribe(epoch=epoch, step_id=step_id)
        for arrival, sequence_id in wanted:
            number = next(self._numbers)
            self._by_number[number], self._number_of[arrival] = arrival, number
            arrival.is_coming, arrival.is_behind = True, False
            message.subscription_ids.append(number)
            message.sequence_ids.append(sequence_id)
            message.starts.append(arrival.end)
        self._outgoing.put_nowait(target_pb2.FeaturesRequest(subscribe=message))

    def unsubscribe(self, arrivals: list[Arrival]) -> None:
        """Sessions that want no more rows; those without a subscription here are ignored."""
        numbers = [self._number_of.pop(arrival) for arrival in arrivals if arrival in self._number_of]
        for number in numbers:
            self._by_number.pop(number).stop()
        if numbers:
            message = target_pb2.Unsubscribe(subscription_ids=numbers)
            self._outgoing.put_nowait(target_pb2.FeaturesRequest(unsubscribe=message))

    async def _run(self) -> None:
        try:
            async with open_channel(self.address, self._max_message_bytes) as channel:
                call = target_pb2_grpc.TargetStub(channel).Features(self._requests())
                async with asyncio.timeout(_HELLO_TIMEOUT_S):
                    reply = await call.read()
                while reply != grpc.aio.EOF:
                    self._take(reply)
                    await self._arrivals.room()
                    reply = await call.read()
                logger.warning("features from %s ended: %s", self.address, await call.details())
        except grpc.aio.AioRpcError as error:
            logger.warning("features from %s ended: %s", self.address, error.details())
        except TimeoutError:
            logger.warning("%s did not answer the hello of its features in time", self.address)
        except ValueError as error:
            logger.error("features from %s are malformed, their stream ends: %s", self.address, error)
        finally:
            for arrival in self._number_of:
                arrival.stop()

    async def _requests(self) -> AsyncIterator[target_pb2.FeaturesRequest]:
        yield target_pb2.FeaturesRequest(hello=self._hello)
        while True:
            yield await self._outgoing.get()

    def _take(self, message: target_pb2.FeaturesResponse) -> None:
        """Raises ValueError when the message is malformed."""
        match message.WhichOneof("message"):
            case "hello":
                if message.hello.protocol_version != PROTOCOL_VERSION:
                    raise ValueError(f"protocol_version {message.hello.protocol_version} is not {PROTOCOL_VERSION}")
            case "features":
                self._take_features(message.features)
            case "end":
                for number in message.end.subscription_ids:
                    arrival = self._by_number.pop(number, None)
                    if arrival is not None:
                        del self._number_of[arrival]
                        arrival.stop()

    def _take_features(self, features: target_pb2.ContextFeatures) -> None:
        rows = rows_of(features, self._width)
        at = 0
        for number, start, count in zip(features.subscription_ids, features.starts, features.num_rows, strict=True):
            arrival = self._by_number.get(number)
            if arrival is not None and not self._arrivals.put(arrival, start, rows[at : at + count]):
                raise ValueError(f"features: rows from {start} on follow {arrival.end} rows")
            at += count

    async def close(self) -> None:
        """Ends the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class FeatureSources:
    """Streams by address, each kept while a router's stream uses it."""

    def __init__(
        self, drafter_id: str, fingerprint: str, width: int, max_message_bytes: int, arrivals: Arrivals
    ) -> None:
        self._hello = target_pb2.FeaturesHello(
            protocol_version=PROTOCOL_VERSION, drafter_id=drafter_id, fingerprint=fingerprint
        )
        self._width = width
        self._max_message_bytes = max_message_bytes
        self._arrivals = arrivals
        self._sources: dict[str, FeatureSource] = {}
        self._users: dict[str, set[int]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def open(self, address: str, stream: int) -> FeatureSource:
        """The stream to a target group, for a router's stream."""
        source = self._sources.get(address)
        if source is None or source.is_over:
            source = FeatureSource(address, self._hello, self._width, self._max_message_bytes, self._arrivals)
            self._sources[address] = source
        self._users.setdefault(address, set()).add(stream)
        return source

    def unsubscribe(self, arrivals: list[Arrival]) -> None:
        """Sessions that want no more rows."""
        for source in self._sources.values():
            source.unsubscribe(arrivals)

    def drop_stream(self, stream: int) -> None:
        """A router's stream has ended."""
        for address, users in list(self._users.items()):
            users.discard(stream)
            if not users:
                del self._users[address]
                self._close(self._sources.pop(address))

    def _close(self, source: FeatureSource) -> None:
        task = asyncio.create_task(source.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Ends all streams."""
        sources, self._sources = self._sources, {}
        await asyncio.gather(*(source.close() for source in sources.values()))
