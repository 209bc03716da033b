"""Tokens from routers, as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TypeVar

from dflash_ray.gateway.choice import Choice, ChoiceDelta
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.resumption import ResumedCall
from dflash_ray.gateway.routers import Routers
from dflash_ray.observability.metrics import GatewayMetrics
from dflash_ray.pb import common_pb2
from dflash_ray.text.tokenizer import ChatTokenizer

Item = TypeVar("Item")


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
        self._num_generated = metrics.generation_tokens.labels(model)
        self._inter_token_latency = metrics.inter_token_latency.labels(model)
        self._timeout_s = timeout_s
        self._wait_s = wait_s

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[ChoiceDelta, None]:
        """Deltas of all choices as they come. Raises RequestError; leaving early cancels the router calls.

        A choice's first delta is empty and comes when a router has taken it.
        """
        deadline = time.monotonic() + min(timeout_s or self._timeout_s, self._timeout_s)
        self._metrics.prompt_tokens.labels(self._model).inc(len(request.prompt_ids))
        self._metrics.request_prompt_tokens.labels(self._model).observe(len(request.prompt_ids))
        choices = [self._choice(_seeded(request, index), index, deadline) for index in range(request.num_choices)]
        if len(choices) == 1:
            async with aclosing(choices[0]) as deltas:
                async for delta in deltas:
                    yield delta
            return
        async with aclosing(merge(choices)) as merged:
            async for batch in merged:
                for delta in batch:
                    yield delta

    async def _choice(
        self, request: GenerationRequest, index: int, deadline: float
    ) -> AsyncGenerator[ChoiceDelta, None]:
        choice = Choice(request, index, self._tokenizer)
        started = last = time.monotonic()
        num_tokens = 0
        resumed = self._metrics.resumed.labels(self._model).inc
        chunks = ResumedCall(self._routers, request, choice.take, deadline, self._wait_s, resumed).chunks()
        try:
            async for _, delta in chunks:
                now = time.monotonic()
                if delta.token_ids:
                    self._observe(len(delta.token_ids), num_tokens, now - started, now - last)
                    num_tokens += len(delta.token_ids)
                last = now
                if delta.finish_reason:
                    self._finish(delta.finish_reason, num_tokens, now - started)
                yield delta
                if delta.finish_reason:
                    return
        finally:
            await chunks.aclose()

    def _observe(self, new: int, before: int, since_start: float, since_last: float) -> None:
        self._num_generated.inc(new)
        if before == 0:
            self._metrics.time_to_first_token.labels(self._model).observe(since_start)
        else:
            self._inter_token_latency.observe(since_last / new, new)

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


async def merge(
    sources: Sequence[AsyncGenerator[ChoiceDelta, None]], silence_s: float | None = None
) -> AsyncGenerator[list[ChoiceDelta], None]:
    """Items of several generators in the order they come, all that are there at a time; the first error ends all.

    Args:
        silence_s: an empty list comes whenever nothing has come for so long.
    """
    queue: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue()

    async def drain(source: AsyncIterator[ChoiceDelta]) -> None:
        try:
            async for item in source:
                queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    num_running = len(tasks)
    try:
        while num_running:
            came = await _all_there(queue, silence_s)
            failure = next((item for item in came if isinstance(item, Exception)), None)
            items = [item for item in came if isinstance(item, ChoiceDelta)]
            num_running -= came.count(None)
            if items or not came:
                yield items
            if failure is not None:
                raise failure
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _all_there(queue: asyncio.Queue[Item], silence_s: float | None) -> list[Item]:
    """At least one item, or none after `silence_s`."""
    items: list[Item] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(silence_s):
            items.append(await queue.get())
    while not queue.empty():
        items.append(queue.get_nowait())
    return items
