"""The Drafter gRPC service: greets, hands requests on, and keeps the metrics."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import AsyncIterator

import grpc

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.arrivals import Arrivals
from dflash_ray.drafter.drafts import Drafts
from dflash_ray.drafter.feature_sources import FeatureSources
from dflash_ray.drafter.sessions import PASSED, REFUSED, DraftSessions
from dflash_ray.models.draft_contexts import DraftMethod
from dflash_ray.observability.metrics import DrafterMetrics
from dflash_ray.pb import drafter_pb2, drafter_pb2_grpc


class BusyMeter:
    """Share of the last seconds that the compute thread spent drafting."""

    def __init__(self, window_s: float = 2.0) -> None:
        self._window_s = window_s
        self._spans: deque[tuple[float, float]] = deque()
        self._since = time.monotonic()

    def record(self, start: float, end: float) -> None:
        """Adds a busy span, in seconds of time.monotonic()."""
        self._spans.append((start, end))
        self._trim(end)

    def fraction(self) -> float:
        """Busy share of the window, 0 to 1."""
        now = time.monotonic()
        self._trim(now)
        begin = max(now - self._window_s, self._since)
        busy = sum(end - max(start, begin) for start, end in self._spans)
        return min(1.0, busy / max(now - begin, 1e-3))

    def _trim(self, now: float) -> None:
        while self._spans and self._spans[0][1] < now - self._window_s:
            self._spans.popleft()


class DrafterServicer(drafter_pb2_grpc.DrafterServicer):
    """One bidirectional stream a router; requests of all streams are answered in arrival order."""

    def __init__(
        self,
        drafter_id: str,
        method: DraftMethod,
        max_context_tokens: int,
        max_message_bytes: int,
        watchdog: Watchdog,
        metrics: DrafterMetrics,
        reads_shared_memory: bool = True,
    ) -> None:
        self._drafter_id = drafter_id
        self._method = method
        self._metrics = metrics
        self._sessions = DraftSessions(method, max_context_tokens)
        self._stream_ids = itertools.count()
        self.busy = BusyMeter()
        arrivals = Arrivals()
        sources = None
        if method.feature_width:
            sources = FeatureSources(
                drafter_id,
                method.fingerprint,
                method.feature_width,
                max_message_bytes,
                arrivals,
                reads_shared_memory,
            )
        self._drafts = Drafts(self._sessions, arrivals, sources, watchdog, self.busy.record)

    async def Draft(
        self, request_iterator: AsyncIterator[drafter_pb2.DrafterRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[drafter_pb2.DrafterResponse]:
        stream = next(self._stream_ids)
        has_greeted = False
        try:
            async for request in request_iterator:
                if request.WhichOneof("message") == "hello":
                    await self._check_hello(request.hello, context)
                    has_greeted = True
                    yield drafter_pb2.DrafterResponse(hello=self._hello())
                elif not has_greeted:
                    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the first message must be a hello")
                else:
                    yield drafter_pb2.DrafterResponse(drafts=await self._answer(stream, request.draft, context))
        finally:
            self._drafts.drop_stream(stream)

    async def _check_hello(self, hello: drafter_pb2.DrafterHello, context: grpc.aio.ServicerContext) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol_version {hello.protocol_version} is not {PROTOCOL_VERSION}: run one release everywhere",
            )

    def _hello(self) -> drafter_pb2.DrafterHelloReply:
        return drafter_pb2.DrafterHelloReply(
            protocol_version=PROTOCOL_VERSION,
            drafter_id=self._drafter_id,
            method=self._method.name,
            fingerprint=self._method.fingerprint,
            max_draft_tokens=self._method.max_draft_tokens,
            needs_features=self._method.feature_width > 0,
        )

    async def _answer(
        self, stream: int, request: drafter_pb2.DraftRequest, context: grpc.aio.ServicerContext
    ) -> drafter_pb2.DraftReply:
        try:
            reply = await self._drafts.answer(stream, request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        self._metrics.phase.labels("queue").observe(reply.queue_ns / 1e9)
        self._metrics.phase.labels("draft").observe(reply.draft_ns / 1e9)
        for reason in reply.missing_reasons:
            if reason == REFUSED:
                self._metrics.refused.inc()
            elif reason != PASSED:
                self._metrics.missing.inc()
        return reply

    async def close(self) -> None:
        """Ends the streams to target groups."""
        await self._drafts.close()

    def render_metrics(self) -> str:
        """This process's metrics, gauges brought up to date."""
        self._metrics.live_sessions.set(len(self._sessions))
        self._metrics.context_rows.set(self._sessions.num_context_rows)
        self._metrics.busy_fraction.set(self.busy.fraction())
        return self._metrics.render()
