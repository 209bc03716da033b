"""Tokens from routers, as text."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from dflash_ray.gateway.choice import Choice, ChoiceDelta
from dflash_ray.gateway.mailbox import Mailbox
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.resumption import ResumedCall
from dflash_ray.gateway.routers import Routers
from dflash_ray.observability.metrics import GatewayMetrics
from dflash_ray.pb import common_pb2
from dflash_ray.text.tokenizer import ChatTokenizer


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
        self, request: GenerationRequest, timeout_s: float | None = None, silence_s: float | None = None
    ) -> AsyncGenerator[list[ChoiceDelta], None]:
        """Deltas of all choices, all that are there at a time. Raises RequestError; leaving early cancels the calls.

        A choice's first delta is empty and comes when a router has taken it.

        Args:
            silence_s: an empty list comes whenever nothing has come for so long.
        """
        deadline = time.monotonic() + min(timeout_s or self._timeout_s, self._timeout_s)
        self._metrics.prompt_tokens.labels(self._model).inc(len(request.prompt_ids))
        self._metrics.request_prompt_tokens.labels(self._model).observe(len(request.prompt_ids))
        mailbox: Mailbox[ChoiceDelta] = Mailbox(silence_s)
        calls = [self._call(_seeded(request, i), i, deadline, mailbox) for i in range(request.num_choices)]
        try:
            for call in calls:
                call.start()
            num_running = len(calls)
            while num_running:
                deltas = await mailbox.take()
                num_running -= sum(1 for delta in deltas if delta.finish_reason)
                yield deltas
        finally:
            mailbox.close()
            for call in calls:
                call.close()

    def _call(
        self, request: GenerationRequest, index: int, deadline: float, mailbox: Mailbox[ChoiceDelta]
    ) -> ResumedCall[ChoiceDelta]:
        choice = Choice(request, index, self._tokenizer)
        progress = _Progress(self._metrics, self._model)

        def tell(delta: ChoiceDelta | Exception) -> None:
            if isinstance(delta, ChoiceDelta):
                progress.observe(delta)
                if delta.finish_reason:  # by a stop string, of which the router knows nothing
                    call.close()
            mailbox.put(delta)

        resumed = self._metrics.resumed.labels(self._model).inc
        call = ResumedCall(self._routers, request, choice.take, tell, deadline, self._wait_s, resumed)
        return call


class _Progress:
    """The metrics of one choice."""

    def __init__(self, metrics: GatewayMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._num_generated = metrics.generation_tokens.labels(model)
        self._inter_token_latency = metrics.inter_token_latency.labels(model)
        self._started = self._last = time.monotonic()
        self._num_tokens = 0

    def observe(self, delta: ChoiceDelta) -> None:
        now = time.monotonic()
        count = len(delta.token_ids)
        if count:
            self._num_generated.count += count
            if self._num_tokens:
                self._inter_token_latency.observe((now - self._last) / count, count)
            else:
                self._metrics.time_to_first_token.labels(self._model).observe(now - self._started)
            self._num_tokens += count
        self._last = now
        if delta.finish_reason:
            self._finish(delta.finish_reason, now - self._started)

    def _finish(self, reason: common_pb2.FinishReason, seconds: float) -> None:
        name = common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
        self._metrics.request_success.labels(self._model, name).inc()
        self._metrics.e2e_latency.labels(self._model).observe(seconds)
        self._metrics.request_generation_tokens.labels(self._model).observe(self._num_tokens)


def _seeded(request: GenerationRequest, index: int) -> GenerationRequest:
    """The request of one choice: the seed rises by one with every choice."""
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    sampling.seed = (sampling.seed + index) % 2**64
    return replace(request, sampling=sampling)
