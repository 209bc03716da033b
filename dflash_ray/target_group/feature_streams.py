"""Context features on their way to drafters: who wants which rows, and how far each of them has got.

Lives on the server's event loop. Nothing is buffered here: a subscription is a place in the feature store, and its rows
are read from there when its drafter can take them. So a slow reader costs nothing and holds nobody up, rows of a step
and rows of long ago go the same way, and what nobody asked for is never touched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple

import grpc

from dflash_ray.core.arrays import Ids, Ints
from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.models.context_features import PackedRows, encode_features
from dflash_ray.models.feature_pages import Uses, encode_named
from dflash_ray.pb import target_pb2
from dflash_ray.target_group.subscriptions import Sequences, Subscriptions

logger = logging.getLogger(__name__)

_MOST_NAMED = 4096  # rows of one message that only names them
ReadRows = Callable[[Ids, Ints, Ints], PackedRows]


class SharedRows(NamedTuple):
    """Rows for drafters of this machine.

    Attributes:
        offer: the memory that they lie in.
        name: pages and uses (`feature_pages.py`) of the rows of (sequence ids, starts, counts).
    """

    offer: target_pb2.FeatureMemory
    name: Callable[[Ids, Ints, Ints], tuple[Ints, Uses]]


class _MalformedError(ValueError):
    """A request that names what is wrong with it."""


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
        ends: subscriptions that the drafter is to be told are over.
        names_rows: the drafter has the memory mapped in which they lie.
    """

    def __init__(self, sequences: Sequences) -> None:
        self.subscriptions = Subscriptions(sequences)
        self.waiting: dict[int, _Wanted] = {}
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
        self._sequences = Sequences()
        self._streams: set[_Stream] = set()

    def lead(self, epoch: int) -> None:
        """A router leads under a new lease: the sequences of the one before are over."""
        self._end(self._sequences.close_all(), target_pb2.FEATURES_END_REASON_SUPERSEDED)
        self._epoch, self._step_id = epoch, 0
        for stream in self._streams:
            self._resolve(stream)

    def receive(self, step: target_pb2.Step) -> None:
        """A step was read: it closes and opens sequences before any row of it is computed."""
        self.close(step.close)
        self.close([message.sequence_id for message in step.open])
        for message in step.open:
            if message.wants_features:
                self._sequences.open(message.sequence_id, step.step_id)
        self._step_id = step.step_id
        for stream in self._streams:
            if stream.waiting:
                self._resolve(stream)

    def close(self, sequence_ids: Iterable[int]) -> None:
        """Sequences are to be closed, as soon as the compute thread comes to it; unknown ids are ignored."""
        self._end(self._sequences.close(sequence_ids), target_pb2.FEATURES_END_REASON_CLOSED)

    def publish(self, epoch: int, step_id: int, sequence_ids: Iterable[int], num_rows: Ints) -> None:
        """A step of a lease is done: sequences have so many rows in the store."""
        if epoch != self._epoch:
            return  # another router leads since the step was read
        self._sequences.publish(step_id, sequence_ids, num_rows)
        for stream in self._streams:
            if stream.subscriptions.is_behind:
                stream.awake.set()

    def _end(self, places: list[int], reason: target_pb2.FeaturesEndReason) -> None:
        """The sequences at these places are over."""
        for stream in self._streams if places else ():
            for number in stream.subscriptions.remove_of(places):
                stream.end(number, reason)

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
        elif (place := self._sequences.place(wanted.sequence_id)) is None:
            stream.end(number, target_pb2.FEATURES_END_REASON_UNKNOWN)
        else:
            stream.subscriptions.add(number, place, wanted.start)
            stream.awake.set()

    async def serve(
        self, requests: AsyncIterator[target_pb2.FeaturesRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        """One drafter's stream of FeaturesResponses, from its hello on."""
        asked = await self._greet(requests, context)
        hello = target_pb2.FeaturesHelloReply(protocol_version=PROTOCOL_VERSION, target_id=self._target_id)
        if asked.reads_shared_memory and self._shared is not None:
            hello.memory.CopyFrom(self._shared.offer)
        yield target_pb2.FeaturesResponse(hello=hello).SerializeToString()
        stream = _Stream(self._sequences)
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
                        stream.subscriptions.remove(number)
                case "mapped":
                    if self._shared is None:
                        raise _MalformedError("mapped: there is no shared memory here")
                    stream.names_rows = True

    def _next(self, stream: _Stream) -> bytes | None:
        """The next message for a drafter; None when it has everything."""
        shared = self._shared if stream.names_rows else None
        picked = stream.subscriptions.pick(self._rows_per_piece if shared is None else _MOST_NAMED)
        if picked is not None:
            numbers, *rows = picked
            starts, counts = picked.starts.tolist(), picked.counts.tolist()
            if shared is not None:
                return encode_named(numbers, starts, counts, *shared.name(*rows))
            return encode_features(numbers, starts, counts, self._read(*rows))
        if stream.ends:
            ends, stream.ends = stream.ends, []
            end = target_pb2.FeaturesEnd(
                subscription_ids=[number for number, _ in ends], reasons=[reason for _, reason in ends]
            )
            return target_pb2.FeaturesResponse(end=end).SerializeToString()
        return None


def _check(request: target_pb2.Subscribe, stream: _Stream) -> None:
    """Raises _MalformedError that names the column at fault."""
    count = len(request.subscription_ids)
    for name in ("sequence_ids", "starts"):
        if len(getattr(request, name)) != count:
            raise _MalformedError(f"{name} has {len(getattr(request, name))} elements for {count} subscription_ids")
    numbers = set(request.subscription_ids)
    if len(numbers) != count or any(number in stream.subscriptions for number in numbers):
        raise _MalformedError("subscription_ids: a number is used twice")
