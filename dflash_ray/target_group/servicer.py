"""The Target gRPC service: fencing by lease epoch, steps in order on the one compute thread, timings."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import grpc

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.observability.metrics import TargetMetrics
from dflash_ray.pb import target_pb2, target_pb2_grpc
from dflash_ray.target_group.codec import decode_step, encode_result
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_streams import FeatureStreams
from dflash_ray.target_group.step import StepFeatures, StepInput, StepOutput
from dflash_ray.target_group.step_check import StepLimits, check_step

logger = logging.getLogger(__name__)
T = TypeVar("T")
_PHASES = ("queue", "forward", "verify", "draft")
_STEPS_IN_FLIGHT = 2  # of a stream: one runs, and the next is ready when it ends
_MAX_ANSWERS = 64  # that a stream waits for; a router that sends more is read later


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What a router must know of the group; fields as in TargetHelloReply."""

    target_id: str
    model_fingerprint: str
    feature_fingerprint: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    max_batch_tokens: int
    tp_size: int
    colocated_draft_tokens: int


class _Refusal(Exception):
    """Ends a stream with a status."""

    def __init__(self, details: str, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION) -> None:
        super().__init__(details)
        self.code, self.details = code, details


@dataclass(frozen=True, slots=True)
class _Answer:
    """Work of the compute thread, and the responses that its result makes."""

    work: asyncio.Future[Any]
    encode: Callable[[Any], Iterable[target_pb2.TargetResponse]]


class _Stream:
    """A router's stream: its epoch, once it said hello, and the answers that it waits for; None ends it."""

    def __init__(self) -> None:
        self.epoch = 0
        self.answers: asyncio.Queue[_Answer | _Refusal | None] = asyncio.Queue(_MAX_ANSWERS)
        self.room = asyncio.Semaphore(_STEPS_IN_FLIGHT)


def _done() -> asyncio.Future[None]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


class TargetServicer(target_pb2_grpc.TargetServicer):
    """One stream at a time leads the group: the one with the highest lease epoch.

    Args:
        features: what drafters are served; None where the group keeps no features.
    """

    def __init__(
        self,
        engine: Engine,
        info: TargetInfo,
        compute: ThreadPoolExecutor,
        watchdog: Watchdog,
        metrics: TargetMetrics,
        features: FeatureStreams | None = None,
    ) -> None:
        self._features = features
        self._keeper = ThreadPoolExecutor(1, "features")
        self._engine = engine
        self._watchdog = watchdog
        self._info = info
        self._compute = compute
        self._metrics = metrics
        self._phases = {f"{phase}_ns": metrics.phase.labels(phase) for phase in _PHASES}
        self._entries: dict[int, Any] = {}  # counters by status
        self._limits = StepLimits(info.max_batch_tokens, info.max_model_len, info.vocab_size)
        self._counted_prefixes = (0, 0)  # tokens queried and found that the metrics have
        self._epoch = 0
        self._opened: dict[int, set[int]] = {}  # epoch -> sequences opened under it

    async def Verify(
        self, request_iterator: AsyncIterator[target_pb2.TargetRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[target_pb2.TargetResponse]:
        stream = _Stream()
        reader = asyncio.create_task(self._read(request_iterator, stream))
        try:
            while (answer := await stream.answers.get()) is not None:
                if isinstance(answer, _Refusal):
                    await context.abort(answer.code, answer.details)
                    return
                for response in answer.encode(await answer.work):
                    yield response
            await reader
        finally:
            reader.cancel()
            # Not awaited: the handler may be ending by cancellation, and the thread keeps the order of its work.
            opened = list(self._opened.pop(stream.epoch, ()))
            self._end_features(opened)
            self._compute.submit(self._engine.close, opened)

    async def Features(
        self, request_iterator: AsyncIterator[target_pb2.FeaturesRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        """Yields encoded FeaturesResponses."""
        if self._features is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this group has no features for remote drafters")
        async for response in self._features.serve(request_iterator, context):
            yield response

    def _end_features(self, sequence_ids: Iterable[int]) -> None:
        if self._features is not None:
            self._features.close(sequence_ids)

    async def _read(self, requests: AsyncIterator[target_pb2.TargetRequest], stream: _Stream) -> None:
        """Puts the answers to a stream's messages into its queue, in order; nothing follows a refusal."""
        try:
            async for request in requests:
                await stream.answers.put(await self._answer(request, stream))
        except _Refusal as refusal:
            await stream.answers.put(refusal)
        except Exception:  # the message that fails ends its stream
            await stream.answers.put(None)
            raise
        else:
            await stream.answers.put(None)

    async def _answer(self, request: target_pb2.TargetRequest, stream: _Stream) -> _Answer:
        """Hands a message to the compute thread. Raises _Refusal for one that ends its stream."""
        kind = request.WhichOneof("message")
        if kind == "hello":
            return self._greet(request.hello, stream)
        self._check_lead(stream)
        if kind == "step":
            return await self._step(request.step, stream)
        sequence_ids = list(request.close.sequence_ids)
        self._opened[stream.epoch].difference_update(sequence_ids)
        self._end_features(sequence_ids)
        return _Answer(self._run(lambda: self._engine.close(sequence_ids)), lambda _: [])

    def _greet(self, hello: target_pb2.TargetHello, stream: _Stream) -> _Answer:
        if hello.protocol_version != PROTOCOL_VERSION:
            raise _Refusal(
                f"protocol_version {hello.protocol_version} is not {PROTOCOL_VERSION}: run one release everywhere"
            )
        if hello.epoch <= self._epoch:
            raise _Refusal(f"epoch {hello.epoch} is not above {self._epoch}: take a new lease")
        # Sequences of the router that led before end here; it learns so from its next message.
        for epoch in list(self._opened):
            self._compute.submit(self._engine.close, list(self._opened.pop(epoch)))
        if self._features is not None:
            self._features.lead(hello.epoch)
        self._epoch = stream.epoch = hello.epoch
        self._opened[hello.epoch] = set()
        logger.info("router leads this group", extra={"router_id": hello.router_id, "epoch": hello.epoch})
        reply = target_pb2.TargetHelloReply(protocol_version=PROTOCOL_VERSION, **asdict(self._info))
        return _Answer(_done(), lambda _: [target_pb2.TargetResponse(hello=reply)])

    def _check_lead(self, stream: _Stream) -> None:
        if stream.epoch == 0 or stream.epoch < self._epoch:
            raise _Refusal(
                f"epoch {stream.epoch} does not lead this group (now {self._epoch}): say hello with a new lease"
            )

    async def _step(self, message: target_pb2.Step, stream: _Stream) -> _Answer:
        """Decodes and checks a step while another one runs, and hands it on when at most one is before it."""
        received = time.perf_counter_ns()
        try:
            step = decode_step(message)
            check_step(step, self._limits)
        except ValueError as error:
            raise _Refusal(str(error), grpc.StatusCode.INVALID_ARGUMENT) from error
        await stream.room.acquire()
        self._check_lead(stream)  # another router may have said hello meanwhile
        opened = self._opened[stream.epoch]
        opened.difference_update(step.close.tolist())
        opened.update(opening.sequence_id for opening in step.open)
        if self._features is not None:
            self._features.receive(message)
        work = self._run(lambda: self._run_step(step))
        work.add_done_callback(lambda _: stream.room.release())
        return _Answer(work, lambda done: self._encode(*done, stream.epoch, received))

    def _run_step(self, step: StepInput) -> tuple[StepOutput, Future[None] | None]:
        """On the compute thread. Features are stored even if the stream is gone: others may find their rows."""
        output = self._engine.step(step)
        if not self._engine.is_settled:
            self._compute.submit(self._engine.settle)  # while the result is on its way
        if self._features is None or output.features is None:
            return output, None
        return output, self._keeper.submit(self._engine.keep_features, output.features)

    def _encode(
        self, output: StepOutput, kept: Future[None] | None, epoch: int, received: int
    ) -> Iterator[target_pb2.TargetResponse]:
        result = encode_result(output)
        timings = result.timings
        timings.total_ns = time.perf_counter_ns() - received
        timings.queue_ns = max(0, timings.total_ns - timings.forward_ns - timings.verify_ns - timings.draft_ns)
        yield target_pb2.TargetResponse(result=result)
        if self._features is not None and output.features is not None and kept is not None:
            self._publish(output.features, kept, self._features, epoch, output.step_id)
        for phase, histogram in self._phases.items():
            histogram.observe(getattr(timings, phase) / 1e9)
        for status, count in Counter(output.statuses.tolist()).items():
            if status not in self._entries:
                self._entries[status] = self._metrics.entries.labels(target_pb2.EntryStatus.Name(status))
            self._entries[status].inc(count)

    def _publish(
        self, features: StepFeatures, kept: Future[None], streams: FeatureStreams, epoch: int, step_id: int
    ) -> None:
        """Tells the drafters' streams of a step's features once they are stored."""

        def publish(done: asyncio.Future[None]) -> None:
            done.result()
            num_rows = features.starts + features.num_rows
            streams.publish(epoch, step_id, features.sequence_ids.tolist(), num_rows)

        asyncio.wrap_future(kept).add_done_callback(publish)

    def _run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Queues work for the compute thread."""
        return asyncio.get_running_loop().run_in_executor(self._compute, self._watched, work)

    def _watched(self, work: Callable[[], T]) -> T:
        """What fails outside a pass ends its stream, in a pass the whole group."""
        try:
            with self._watchdog.watch():
                return work()
        except Exception:
            if self._engine.is_in_pass:
                # The ranks may be out of step with each other now: only a new group is sure to be right.
                logger.critical("a pass failed; the rank ends and the group is started again", exc_info=True)
                os._exit(1)
            logger.exception("a message of the router could not be served; its stream ends")
            raise

    def render_metrics(self) -> str:
        """This process's metrics, gauges brought up to date."""
        self._metrics.live_sequences.set(self._engine.num_sequences)
        self._metrics.free_pages.set(self._engine.allocator.num_free)
        self._metrics.cached_pages.set(self._engine.allocator.num_kept)
        if self._engine.prefixes is not None:
            counted = self._counted_prefixes
            self._counted_prefixes = (self._engine.prefixes.num_queried, self._engine.prefixes.num_found)
            self._metrics.prefix_queries.inc(self._counted_prefixes[0] - counted[0])
            self._metrics.prefix_hits.inc(self._counted_prefixes[1] - counted[1])
        return self._metrics.render()
