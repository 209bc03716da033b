"""Context features on their way to drafters: who wants which rows, and how far each of them has got.

Lives on the server's event loop. Nothing is buffered here: a subscription is a place in the feature store, and its rows
are read from there when its drafter can take them. So a slow reader costs nothing and holds nobody up, rows of a step
and rows of long ago go the same way, and what nobody asked for is never touched.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import grpc

from dflash_ray.core.arrays import Ints
from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.models.context_features import PackedRows, encode_features
from dflash_ray.models.feature_pages import Uses, encode_named
from dflash_ray.pb import target_pb2

logger = logging.getLogger(__name__)

_MOST_NAMED = 4096  # rows of one message that only names them
ReadRows = Callable[[Sequence[int], Sequence[int], Sequence[int]], PackedRows]


class SharedRows(NamedTuple):
    """Rows for drafters of this machine.

    Attributes:
        offer: the memory that they lie in.
        name: pages and uses (`feature_pages.py`) of the rows of (sequence ids, starts, counts).
    """

    offer: target_pb2.FeatureMemory
    name: Callable[[Sequence[int], Sequence[int], Sequence[int]], tuple[Ints, Uses]]


class _MalformedError(ValueError):
    """A request that names what is wrong with it."""


@dataclass(slots=True, eq=False)
class _Subscription:
    """One drafter's place in a sequence: the next row that it is to be sent."""

    stream: _Stream
    number: int
    at: int
    sequence: _Sequence | None = None  # None once nothing comes any more
    is_behind: bool = False  # it waits in its stream's `behind`


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sequence that is open with features, from the moment that the message which opens it is read."""

    sequence_id: int
    opened_in: int
    num_rows: int = 0
    subscriptions: set[_Subscription] = field(default_factory=set)


class _Wanted(NamedTuple):
    """What a drafter subscribes to."""

    epoch: int
    step_id: int
    sequence_id: int
    start: int


class _Stream:
    """One drafter's stream.

    Attributes:
        waiting: what is subscribed to before the step that opens it was read.
        behind: subscriptions with rows to send, and some that have ended since; whoever was sent some goes to the end.
        ends: subscriptions that the drafter is to be told are over.
        names_rows: the drafter has the memory mapped in which they lie.
    """

    def __init__(self) -> None:
        self.subscriptions: dict[int, _Subscription] = {}
        self.waiting: dict[int, _Wanted] = {}
        self.behind: deque[_Subscription] = deque()
        self.ends: list[tuple[int, target_pb2.FeaturesEndReason]] = []
        self.awake = asyncio.Event()
        self.names_rows = False

    def end(self, number: int, reason: target_pb2.FeaturesEndReason) -> None:
        self.ends.append((number, reason))
        self.awake.set()


class FeatureStreams:
    """Subscriptions of all drafters to the sequences of one target group.

    Args:
        read: rows of (sequence ids, starts, counts), in place. They are copied on the event loop, where no sequence
            that is read is closed before that.
        rows_per_piece: rows of one message.
        fingerprint: of the drafter whose fc makes the features.
        shared: None where they lie in no memory that drafters can read.
    """

    def __init__(
        self,
        read: ReadRows,
        rows_per_piece: int,
        target_id: str,
        fingerprint: str,
        shared: SharedRows | None = None,
    ) -> None:
        self._read = read
        self._shared = shared
        self._rows_per_piece = rows_per_piece
        self._target_id = target_id
        self._fingerprint = fingerprint
        self._epoch = 0
        self._step_id = 0  # of the last step read
        self._sequences: dict[int, _Sequence] = {}
        self._streams: set[_Stream] = set()

    def lead(self, epoch: int) -> None:
        """A router leads under a new lease: the sequences of the one before are over."""
        self._end(list(self._sequences.values()), target_pb2.FEATURES_END_REASON_SUPERSEDED)
        self._epoch, self._step_id = epoch, 0
        for stream in self._streams:
            self._resolve(stream)

    def receive(self, step: target_pb2.Step) -> None:
        """A step was read: it closes and opens sequences before any row of it is computed."""
        self.close(step.close)
        self.close([message.sequence_id for message in step.open])
        for message in step.open:
            if message.wants_features:
                self._sequences[message.sequence_id] = _Sequence(message.sequence_id, step.step_id)
        self._step_id = step.step_id
        for stream in self._streams:
            if stream.waiting:
                self._resolve(stream)

    def close(self, sequence_ids: Iterable[int]) -> None:
        """Sequences are to be closed, as soon as the compute thread comes to it; unknown ids are ignored."""
        known = [self._sequences[sequence_id] for sequence_id in sequence_ids if sequence_id in self._sequences]
        self._end(known, target_pb2.FEATURES_END_REASON_CLOSED)

    def publish(self, epoch: int, step_id: int, sequence_ids: Iterable[int], num_rows: Iterable[int]) -> None:
        """A step of a lease is done: sequences have so many rows in the store."""
        if epoch != self._epoch:
            return  # another router leads since the step was read
        for sequence_id, count in zip(sequence_ids, num_rows, strict=True):
            sequence = self._sequences.get(sequence_id)
            if sequence is None or sequence.opened_in > step_id:
                continue  # closed, and perhaps opened anew, since the step was read
            sequence.num_rows = count
            for subscription in sequence.subscriptions:
                _push(subscription)

    def _end(self, sequences: Iterable[_Sequence], reason: target_pb2.FeaturesEndReason) -> None:
        for sequence in sequences:
            del self._sequences[sequence.sequence_id]
            for subscription in sequence.subscriptions:
                _detach(subscription)
                subscription.stream.end(subscription.number, reason)

    def _resolve(self, stream: _Stream) -> None:
        """Subscribes to what has been opened since it was asked for."""
        waiting, stream.waiting = stream.waiting, {}
        for number, wanted in waiting.items():
            self._subscribe(stream, number, wanted)

    def _subscribe(self, stream: _Stream, number: int, wanted: _Wanted) -> None:
        if wanted.epoch != self._epoch:
            stream.end(number, target_pb2.FEATURES_END_REASON_SUPERSEDED)
        elif wanted.step_id > self._step_id:
            stream.waiting[number] = wanted
        elif (sequence := self._sequences.get(wanted.sequence_id)) is None:
            stream.end(number, target_pb2.FEATURES_END_REASON_UNKNOWN)
        else:
            subscription = _Subscription(stream, number, wanted.start, sequence)
            stream.subscriptions[number] = subscription
            sequence.subscriptions.add(subscription)
            _push(subscription)

    async def serve(
        self, requests: AsyncIterator[target_pb2.FeaturesRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        """One drafter's stream of FeaturesResponses, from its hello on."""
        asked = await self._greet(requests, context)
        hello = target_pb2.FeaturesHelloReply(protocol_version=PROTOCOL_VERSION, target_id=self._target_id)
        if asked.reads_shared_memory and self._shared is not None:
            hello.memory.CopyFrom(self._shared.offer)
        yield target_pb2.FeaturesResponse(hello=hello).SerializeToString()
        stream = _Stream()
        self._streams.add(stream)
        reader = asyncio.create_task(self._take(requests, stream))
        reader.add_done_callback(lambda _: stream.awake.set())
        try:
            while not reader.done():
                stream.awake.clear()
                while (response := self._next(stream)) is not None:
                    yield response
                await stream.awake.wait()
            fault = reader.exception()
            if isinstance(fault, _MalformedError):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(fault))
            elif fault is not None:
                raise fault
        finally:
            reader.cancel()
            self._streams.discard(stream)
            for subscription in list(stream.subscriptions.values()):
                _detach(subscription, from_sequence=True)

    async def _greet(
        self, requests: AsyncIterator[target_pb2.FeaturesRequest], context: grpc.aio.ServicerContext
    ) -> target_pb2.FeaturesHello:
        request = await anext(requests, None)
        hello = request.hello if request is not None else target_pb2.FeaturesHello()
        if request is None or request.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the first message must be a hello")
        if hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol_version {hello.protocol_version} is not {PROTOCOL_VERSION}: run one release everywhere",
            )
        if hello.fingerprint != self._fingerprint:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"fingerprint {hello.fingerprint!r} of drafter {hello.drafter_id} is not that of the features here, "
                f"{self._fingerprint!r}",
            )
        logger.info("a drafter fetches features", extra={"drafter_id": hello.drafter_id})
        return hello

    async def _take(self, requests: AsyncIterator[target_pb2.FeaturesRequest], stream: _Stream) -> None:
        """Takes a stream's requests until it ends. Raises _MalformedError."""
        async for request in requests:
            match request.WhichOneof("message"):
                case "subscribe":
                    wanted = request.subscribe
                    _check(wanted, stream)
                    columns = (wanted.subscription_ids, wanted.sequence_ids, wanted.starts)
                    for number, sequence_id, start in zip(*columns, strict=True):
                        self._subscribe(stream, number, _Wanted(wanted.epoch, wanted.step_id, sequence_id, start))
                case "unsubscribe":
                    for number in request.unsubscribe.subscription_ids:
                        stream.waiting.pop(number, None)
                        subscription = stream.subscriptions.get(number)
                        if subscription is not None:
                            _detach(subscription, from_sequence=True)
                case "mapped":
                    if self._shared is None:
                        raise _MalformedError("mapped: there is no shared memory here")
                    stream.names_rows = True

    def _next(self, stream: _Stream) -> bytes | None:
        """The next message for a drafter; None when it has everything."""
        shared = self._shared if stream.names_rows else None
        numbers, *rows = self._pick(stream, self._rows_per_piece if shared is None else _MOST_NAMED)
        _, starts, counts = rows
        if numbers and shared is not None:
            return encode_named(numbers, starts, counts, *shared.name(*rows))
        if numbers:
            return encode_features(numbers, starts, counts, self._read(*rows))
        if stream.ends:
            ends, stream.ends = stream.ends, []
            end = target_pb2.FeaturesEnd(
                subscription_ids=[number for number, _ in ends], reasons=[reason for _, reason in ends]
            )
            return target_pb2.FeaturesResponse(end=end).SerializeToString()
        return None

    def _pick(self, stream: _Stream, room: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """At most `room` rows for a message, as subscriptions, sequence ids, starts and counts; they count as sent."""
        numbers: list[int] = []
        sequence_ids: list[int] = []
        starts: list[int] = []
        counts: list[int] = []
        behind = stream.behind
        while behind and room:
            subscription = behind.popleft()
            subscription.is_behind = False
            sequence, at = subscription.sequence, subscription.at
            if sequence is None:
                continue
            count = sequence.num_rows - at
            if count > room:
                count = room
            numbers.append(subscription.number)
            sequence_ids.append(sequence.sequence_id)
            starts.append(at)
            counts.append(count)
            room -= count
            subscription.at = at + count
            _push(subscription)
        return numbers, sequence_ids, starts, counts


def _push(subscription: _Subscription) -> None:
    """Puts a subscription to the end of those with rows to send, if it has any and is not among them."""
    sequence = subscription.sequence
    if sequence is not None and subscription.at < sequence.num_rows and not subscription.is_behind:
        subscription.is_behind = True
        stream = subscription.stream
        if not stream.behind:
            stream.awake.set()
        stream.behind.append(subscription)


def _detach(subscription: _Subscription, from_sequence: bool = False) -> None:
    """Nothing comes for a subscription any more."""
    if from_sequence and subscription.sequence is not None:
        subscription.sequence.subscriptions.discard(subscription)
    subscription.sequence = None
    subscription.stream.subscriptions.pop(subscription.number, None)


def _check(request: target_pb2.Subscribe, stream: _Stream) -> None:
    """Raises _MalformedError that names the column at fault."""
    count = len(request.subscription_ids)
    for name in ("sequence_ids", "starts"):
        if len(getattr(request, name)) != count:
            raise _MalformedError(f"{name} has {len(getattr(request, name))} elements for {count} subscription_ids")
    if len(set(request.subscription_ids)) != count or not stream.subscriptions.keys().isdisjoint(
        request.subscription_ids
    ):
        raise _MalformedError("subscription_ids: a number is used twice")
