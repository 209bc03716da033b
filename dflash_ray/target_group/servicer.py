"""The Target gRPC service: fencing by lease epoch, steps in order on the one compute thread, timings."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TypeVar

import grpc

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.observability.metrics import TargetMetrics
from dflash_ray.pb import target_pb2, target_pb2_grpc
from dflash_ray.target_group.engine import Engine, StepOutput
from dflash_ray.target_group.feature_streams import FeatureStreams
from dflash_ray.target_group.step_check import check_step

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
        self._engine = engine
        self._watchdog = watchdog
        self._info = info
        self._compute = compute
        self._metrics = metrics
        self._epoch = 0
        self._opened: dict[int, set[int]] = {}  # epoch -> sequences opened under it

    async def Verify(
        self, request_iterator: AsyncIterator[target_pb2.TargetRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[target_pb2.TargetResponse]:
        epoch = 0
        try:
            async for request in request_iterator:
                kind = request.WhichOneof("message")
                if kind == "hello":
                    epoch = await self._greet(request.hello, context)
                    yield target_pb2.TargetResponse(
                        hello=target_pb2.TargetHelloReply(protocol_version=PROTOCOL_VERSION, **asdict(self._info))
                    )
                elif epoch == 0 or epoch < self._epoch:
                    await context.abort(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"epoch {epoch} does not lead this group (now {self._epoch}): say hello with a new lease",
                    )
                elif kind == "step":
                    await self._check(request.step, context)
                    output = await self._step(epoch, request.step)
                    yield target_pb2.TargetResponse(result=output.result)
                elif kind == "close":
                    self._opened[epoch].difference_update(request.close.sequence_ids)
                    self._end_features(request.close.sequence_ids)
                    await self._run(lambda ids=list(request.close.sequence_ids): self._engine.close(ids))
        finally:
            # Not awaited: the handler may be ending by cancellation, and the thread keeps the order of its work.
            opened = list(self._opened.pop(epoch, ()))
            self._end_features(opened)
            self._compute.submit(self._engine.close, opened)

    async def Features(
        self, request_iterator: AsyncIterator[target_pb2.FeaturesRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[target_pb2.FeaturesResponse]:
        if self._features is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this group has no features for remote drafters")
        async for response in self._features.serve(request_iterator, context):
            yield response

    def _end_features(self, sequence_ids: Iterable[int]) -> None:
        if self._features is not None:
            self._features.close(sequence_ids)

    async def _greet(self, hello: target_pb2.TargetHello, context: grpc.aio.ServicerContext) -> int:
        if hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol_version {hello.protocol_version} is not {PROTOCOL_VERSION}: run one release everywhere",
            )
        if hello.epoch <= self._epoch:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"epoch {hello.epoch} is not above {self._epoch}: take a new lease"
            )
        # Sequences of the router that led before end here; it learns so from its next message.
        for epoch in list(self._opened):
            self._compute.submit(self._engine.close, list(self._opened.pop(epoch)))
        if self._features is not None:
            self._features.lead(hello.epoch)
        self._epoch = hello.epoch
        self._opened[hello.epoch] = set()
        logger.info("router leads this group", extra={"router_id": hello.router_id, "epoch": hello.epoch})
        return hello.epoch

    async def _step(self, epoch: int, step: target_pb2.Step) -> StepOutput:
        received = time.perf_counter_ns()
        opened = self._opened.setdefault(epoch, set())
        opened.difference_update(step.close)
        opened.update(message.sequence_id for message in step.open)
        if self._features is not None:
            self._features.receive(step)
        output = await self._run(lambda: self._engine.step(step))
        if self._features is not None and output.features is not None:
            kept = output.features
            ends = [start + count for start, count in zip(kept.starts, kept.num_rows, strict=True)]
            self._features.publish(step.step_id, kept.sequence_ids, ends)
        result, timings = output.result, output.result.timings
        timings.total_ns = time.perf_counter_ns() - received
        timings.queue_ns = max(0, timings.total_ns - timings.forward_ns - timings.verify_ns - timings.draft_ns)
        for phase in ("queue", "forward", "verify", "draft"):
            self._metrics.phase.labels(phase).observe(getattr(timings, f"{phase}_ns") / 1e9)
        for status in result.statuses:
            self._metrics.entries.labels(target_pb2.EntryStatus.Name(status)).inc()
        return output

    async def _check(self, step: target_pb2.Step, context: grpc.aio.ServicerContext) -> None:
        try:
            check_step(step, self._info.max_batch_tokens)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _run(self, work: Callable[[], T]) -> T:
        """Runs work on the compute thread. What fails outside a pass ends its stream, in a pass the whole group."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compute, self._watched, work)
        except Exception:
            if self._engine.is_in_pass:
                # The ranks may be out of step with each other now: only a new group is sure to be right.
                logger.critical("a pass failed; the rank ends and the group is started again", exc_info=True)
                os._exit(1)
            logger.exception("a message of the router could not be served; its stream ends")
            raise

    def _watched(self, work: Callable[[], T]) -> T:
        with self._watchdog.watch():
            return work()

    def render_metrics(self) -> str:
        """This process's metrics, gauges brought up to date."""
        self._metrics.live_sequences.set(self._engine.num_sequences)
        self._metrics.free_pages.set(self._engine.allocator.num_free)
        return self._metrics.render()
