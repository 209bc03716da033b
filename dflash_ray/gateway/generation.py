"""Tokens from routers, as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from itertools import count

from dflash_ray.core.errors import RequestError
from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.gateway.detokenizer import Detokenizer, StopStrings
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.resumption import ResumedCall
from dflash_ray.gateway.routers import Routers
from dflash_ray.gateway.tokenizer import ChatTokenizer
from dflash_ray.observability.metrics import GatewayMetrics
from dflash_ray.pb import common_pb2, router_pb2

STOP = common_pb2.FINISH_REASON_STOP


@dataclass(slots=True)
class ChoiceDelta:
    """New text and tokens of one choice.

    Attributes:
        token_ids: new tokens; the text of some of them may come later.
        finish_reason: set on the last delta, with `stop` when a stop string or token ended it.
        stats: on the last delta.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: common_pb2.TokenLogprobs | None = None
    finish_reason: common_pb2.FinishReason = common_pb2.FINISH_REASON_UNSPECIFIED
    stop: str | int | None = None
    stats: AcceptanceStats | None = None


class Generator:
    """Runs requests; knows nothing of HTTP or of the client's gRPC."""

    def __init__(
        self,
        routers: Routers,
        tokenizer: ChatTokenizer,
        metrics: GatewayMetrics,
        model: str,
        timeout_s: float,
        wait_s: float,
    ) -> None:
        self._routers = routers
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._model = model
        self._timeout_s = timeout_s
        self._wait_s = wait_s

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[ChoiceDelta, None]:
        """Deltas of all choices as they come. Raises RequestError; leaving early cancels the router calls."""
        deadline = time.monotonic() + min(timeout_s or self._timeout_s, self._timeout_s)
        self._metrics.prompt_tokens.labels(self._model).inc(len(request.prompt_ids))
        self._metrics.request_prompt_tokens.labels(self._model).observe(len(request.prompt_ids))
        choices = [self._choice(_seeded(request, index), index, deadline) for index in range(request.num_choices)]
        deltas = choices[0] if len(choices) == 1 else _merge(choices)
        try:
            async for delta in deltas:
                yield delta
        finally:
            await deltas.aclose()

    async def _choice(
        self, request: GenerationRequest, index: int, deadline: float
    ) -> AsyncGenerator[ChoiceDelta, None]:
        detokenizer = Detokenizer(self._tokenizer)
        stops = StopStrings(request.stop_strings, request.include_stop_strings)
        started = last = time.monotonic()
        num_tokens = 0
        resumed = self._metrics.resumed.labels(self._model).inc
        chunks = ResumedCall(self._routers, request, deadline, self._wait_s, resumed).chunks()
        try:
            async for chunk in chunks:
                now = time.monotonic()
                self._observe(chunk, num_tokens, now - started, now - last)
                num_tokens, last = num_tokens + len(chunk.token_ids), now
                delta = _delta(request, index, chunk, detokenizer, stops)
                if delta.finish_reason:
                    self._finish(delta.finish_reason, num_tokens, now - started)
                yield delta
                if delta.finish_reason:
                    return
        finally:
            await chunks.aclose()

    def _observe(self, chunk: router_pb2.TokenChunk, before: int, since_start: float, since_last: float) -> None:
        new = len(chunk.token_ids)
        if not new:
            return
        self._metrics.generation_tokens.labels(self._model).inc(new)
        if before == 0:
            self._metrics.time_to_first_token.labels(self._model).observe(since_start)
        else:
            for _ in range(new):
                self._metrics.inter_token_latency.labels(self._model).observe(since_last / new)

    def _finish(self, reason: common_pb2.FinishReason, num_tokens: int, seconds: float) -> None:
        name = common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
        self._metrics.request_success.labels(self._model, name).inc()
        self._metrics.e2e_latency.labels(self._model).observe(seconds)
        self._metrics.request_generation_tokens.labels(self._model).observe(num_tokens)


def _seeded(request: GenerationRequest, index: int) -> GenerationRequest:
    """The request of one choice: the seed rises by one with every choice."""
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    sampling.seed = (sampling.seed + index) % 2**64
    return replace(request, sampling=sampling)


def _delta(
    request: GenerationRequest, index: int, chunk: router_pb2.TokenChunk, detokenizer: Detokenizer, stops: StopStrings
) -> ChoiceDelta:
    """Text of a chunk, cut at a stop string."""
    reason = chunk.finish_reason
    tokens = list(chunk.token_ids)
    is_stopped = reason == STOP and bool(tokens)
    shown = tokens[:-1] if is_stopped else tokens  # the token that stops is not text
    text = detokenizer.push(shown) + (detokenizer.flush() if reason else "")
    match = stops.push(text)
    delta = ChoiceDelta(index, match.text, tokens, chunk.logprobs if chunk.HasField("logprobs") else None)
    if match.stop is not None:
        delta.finish_reason, delta.stop = STOP, match.stop
    elif reason:
        delta.text += stops.flush()
        delta.finish_reason = reason
        if is_stopped and tokens[-1] not in request.eos_ids:
            delta.stop = tokens[-1]
    if delta.finish_reason:
        delta.stats = _stats(chunk.speculation)
    return delta


def _stats(message: router_pb2.SpeculationStats) -> AcceptanceStats:
    return AcceptanceStats(message.num_spec_tokens, message.num_draft_tokens, list(message.acceptance_histogram) or [0])


async def _merge(sources: list[AsyncGenerator[ChoiceDelta, None]]) -> AsyncGenerator[ChoiceDelta, None]:
    """Items of several generators in the order they come; the first error ends all."""
    queue: asyncio.Queue[ChoiceDelta | RequestError | None] = asyncio.Queue()

    async def drain(source: AsyncIterator[ChoiceDelta]) -> None:
        try:
            async for item in source:
                queue.put_nowait(item)
            queue.put_nowait(None)
        except RequestError as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    try:
        for ended in count():
            if ended == len(tasks):
                return
            while (item := await queue.get()) is not None:
                if isinstance(item, RequestError):
                    raise item
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
