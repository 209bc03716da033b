"""Streams of context features from target groups, one to each of those whose sequences are drafted for here."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from dflash_ray.core.arrays import column
from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.drafter.arrivals import NO_SESSION, Arrivals
from dflash_ray.drafter.rows import Rows
from dflash_ray.models.context_features import PackedRows, decode_response, rows_of
from dflash_ray.models.feature_pages import FeaturePages, NamedRows
from dflash_ray.pb import target_pb2
from dflash_ray.rpc.channel import open_channel
from dflash_ray.rpc.target_service import call_features

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
        self._pages: FeaturePages | None = None  # in the target's memory, where that is to be had here
        self._numbers = itertools.count(1)
        self._session_of: dict[int, int] = {}  # by the subscription's number
        self._number_of: dict[int, int] = {}
        self._outgoing: asyncio.Queue[target_pb2.FeaturesRequest] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())

    @property
    def is_over(self) -> bool:
        return self._task.done()

    def subscribe(self, epoch: int, step_id: int, sessions: list[int], sequence_ids: list[int]) -> None:
        """Asks for the rows that sessions lack, of sequences that are open once a step is done."""
        arrivals = self._arrivals
        numbers = list(itertools.islice(self._numbers, len(sessions)))
        self._session_of.update(zip(numbers, sessions, strict=True))
        self._number_of.update(zip(sessions, numbers, strict=True))
        arrivals.is_coming[sessions], arrivals.is_behind[sessions] = True, False
        message = target_pb2.Subscribe(
            epoch=epoch,
            step_id=step_id,
            subscription_ids=numbers,
            sequence_ids=sequence_ids,
            starts=arrivals.ends[sessions].tolist(),
        )
        self._send(target_pb2.FeaturesRequest(subscribe=message))

    def unsubscribe(self, sessions: list[int]) -> None:
        """Sessions that want no more rows; those without a subscription here are ignored."""
        ended = [session for session in sessions if session in self._number_of]
        if ended:
            numbers = [self._number_of.pop(session) for session in ended]
            for number in numbers:
                del self._session_of[number]
            self._arrivals.stop(ended)
            message = target_pb2.Unsubscribe(subscription_ids=numbers)
            self._send(target_pb2.FeaturesRequest(unsubscribe=message))

    def _send(self, request: target_pb2.FeaturesRequest) -> None:
        self._outgoing.put_nowait(request)

    async def _run(self) -> None:
        try:
            async with open_channel(self.address, self._max_message_bytes) as channel:
                call = call_features(channel, self._requests())
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
        except (ValueError, DecodeError) as error:
            logger.error("features from %s are malformed, their stream ends: %s", self.address, error)
        finally:
            self._arrivals.stop(list(self._number_of))

    async def _requests(self) -> AsyncIterator[target_pb2.FeaturesRequest]:
        yield target_pb2.FeaturesRequest(hello=self._hello)
        while True:
            yield await self._outgoing.get()

    def _take(self, message: bytes) -> None:
        """Raises ValueError or DecodeError when the message is malformed."""
        response, data = decode_response(message)
        match response.WhichOneof("message"):
            case "hello":
                if response.hello.protocol_version != PROTOCOL_VERSION:
                    raise ValueError(f"protocol_version {response.hello.protocol_version} is not {PROTOCOL_VERSION}")
                if response.hello.HasField("memory"):
                    self._map(response.hello.memory)
            case "features":
                self._take_rows(response.features, rows_of(response.features, data, self._width))
            case "named":
                if self._pages is None:
                    raise ValueError("features: rows are named of memory that is not mapped")
                self._take_rows(response.named, self._pages.named(response.named))
            case "end":
                known = [number for number in response.end.subscription_ids if number in self._session_of]
                ended = [self._session_of.pop(number) for number in known]
                for session in ended:
                    del self._number_of[session]
                self._arrivals.stop(ended)

    def _map(self, memory: target_pb2.FeatureMemory) -> None:
        """Asks for names of rows if the target's memory is to be had here; else they come in messages."""
        try:
            self._pages = FeaturePages.open(memory, self._width)
        except OSError as error:
            logger.info("features of %s come in messages: %s", self.address, error)
        else:
            self._send(target_pb2.FeaturesRequest(mapped=target_pb2.FeaturesMapped()))

    def _take_rows(
        self, columns: target_pb2.ContextFeatures | target_pb2.NamedFeatures, data: PackedRows | NamedRows
    ) -> None:
        sessions = np.array([self._session_of.get(number, NO_SESSION) for number in columns.subscription_ids])
        rows = Rows.of(sessions, column(columns.starts), column(columns.num_rows), data)
        is_known = sessions != NO_SESSION
        if not is_known.all():
            rows = rows.only(is_known)
        if len(rows.sessions) and (gap := self._arrivals.put(rows)) is not None:
            end = self._arrivals.ends[rows.sessions[gap]]
            raise ValueError(f"features: rows from {rows.starts[gap]} on follow {end} rows")

    async def close(self) -> None:
        """Ends the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class FeatureSources:
    """Streams by address, each kept while a router's stream uses it."""

    def __init__(
        self,
        drafter_id: str,
        fingerprint: str,
        width: int,
        max_message_bytes: int,
        arrivals: Arrivals,
        reads_shared_memory: bool = True,
    ) -> None:
        self._hello = target_pb2.FeaturesHello(
            protocol_version=PROTOCOL_VERSION,
            drafter_id=drafter_id,
            fingerprint=fingerprint,
            reads_shared_memory=reads_shared_memory,
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

    def unsubscribe(self, sessions: list[int]) -> None:
        """Sessions that want no more rows."""
        for source in self._sources.values():
            source.unsubscribe(sessions)

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
