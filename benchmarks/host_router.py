"""Router and gateway as they are, driven without sockets: each takes and gives the bytes of its wires."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from host_cases import DRAFTS, EPOCH, FINGERPRINT, Case, Clock, Texts

from dflash_ray.gateway.choice import Choice
from dflash_ray.gateway.generation import _Progress
from dflash_ray.gateway.openai_responses import ResponseWriter
from dflash_ray.gateway.openai_types import ChatCompletionRequest
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.token_chunks import unpack
from dflash_ray.observability.metrics import GatewayMetrics, RouterMetrics
from dflash_ray.pb import drafter_pb2, router_pb2, target_pb2
from dflash_ray.router import ngram_drafts
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.gateway_streams import GatewayStream
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.pipeline import Pipeline


def indexed_at_once() -> AbstractContextManager[object]:
    """While it lasts a poll indexes all texts for n-grams, as they are once a server has run for a while."""
    return patch.object(ngram_drafts, "_INDEXED_AT_ONCE", 2**31)


class _Outbox:
    """Stands for a stream: keeps what it is given."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def send(self, item: Any) -> None:
        self.items.append(item)

    def take(self) -> list[Any]:
        items, self.items = self.items, []
        return items


class OneGroup:
    """Stands for a router's fleet: one pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def pick(self, model_fingerprint: str = "") -> Pipeline:
        return self._pipeline


class Router:
    """Scheduler, pipeline and protobuf of one target group's router, and a gateway's stream."""

    def __init__(self, case: Case, clock: Clock, vocab_size: int) -> None:
        config = case.config()
        self._clock = clock
        self._pipeline = Pipeline(config, "router", RouterMetrics())
        self._gateway = GatewayStream(OneGroup(self._pipeline))  # type: ignore[arg-type]
        self._pipeline._target = self._target = _Outbox()  # type: ignore[assignment]
        self._drafters = {f"drafter{i}": _Outbox() for i in range(case.num_drafters)}
        self._pipeline._drafters.update(self._drafters)  # type: ignore[arg-type]
        limits = TargetLimits(
            epoch=EPOCH,
            max_model_len=config.model.max_model_len or 0,
            vocab_size=vocab_size,
            page_size=config.target.page_size,
            num_pages=config.target.num_pages,
            max_batch_tokens=config.target.max_batch_tokens,
            feature_fingerprint=FINGERPRINT,
            address="target",
        )
        self._pipeline.scheduler.target_ready(limits, time.monotonic())
        for name in self._drafters:
            self._pipeline.scheduler.drafting.join(DrafterState(name, True, DRAFTS))

    async def take_requests(self, data: bytes) -> None:
        message = router_pb2.RouterRequest.FromString(data)
        self._gateway.take(message)
        while self._pipeline.load < len(message.open) or not self._target.items:
            await asyncio.sleep(0)

    def take_from_target(self, data: bytes) -> None:
        self._clock.to("router codec")
        message = target_pb2.TargetResponse.FromString(data)
        self._clock.to("router scheduling")
        self._pipeline._on_target_message(message)
        self._clock.to(None)

    def take_from_drafter(self, name: str, data: bytes) -> None:
        self._clock.to("router codec")
        message = drafter_pb2.DrafterResponse.FromString(data)
        self._clock.to("router scheduling")
        self._pipeline._on_drafts(name, message.drafts)
        self._clock.to(None)

    def to_target(self) -> list[bytes]:
        self._clock.to("router codec")
        messages = [message.SerializeToString() for message in self._target.take()]
        self._clock.to(None)
        return messages

    def to_drafters(self) -> list[tuple[str, bytes]]:
        self._clock.to("router codec")
        messages = [
            (name, message.SerializeToString()) for name, out in self._drafters.items() for message in out.take()
        ]
        self._clock.to(None)
        return messages

    async def to_gateway(self) -> bytes:
        """What has come of all calls since the last time; empty for nothing."""
        if not self._gateway.outbox._has_news.is_set():
            return b""
        self._clock.to("router outbox")
        message = await self._gateway.outbox.take()
        data = b"" if message is None else message.SerializeToString()
        self._clock.to(None)
        return data


class Gateway:
    """Requests out, tokens in, server-sent events out."""

    def __init__(self, case: Case, clock: Clock, texts: Texts) -> None:
        self._clock = clock
        self._requests = [texts.request(index) for index in range(case.sequences)]
        self._choices = [Choice(request, 0, texts.tokenizer) for request in self._requests]
        body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "."}], "stream": True})
        self._writers = [
            ResponseWriter("chat", request.request_id, "model", texts.tokenizer, body, [request])
            for request in self._requests
        ]
        metrics = GatewayMetrics()
        self._progress = [_Progress(metrics, "model") for _ in self._requests]

    def requests(self) -> bytes:
        """The message that opens all requests at the router."""
        message = router_pb2.RouterRequest()
        for index, request in enumerate(self._requests):
            message.open.add(call_id=index, timeout_ms=10**9, request=token_request(request))
        return message.SerializeToString()

    def take(self, data: bytes) -> tuple[int, int]:
        """Requests that got tokens, and the bytes that clients get."""
        self._clock.to("gateway")
        count = size = 0
        for call_id, chunk in unpack(router_pb2.RouterResponse.FromString(data).progress):
            if isinstance(chunk, Exception):
                raise chunk
            delta = self._choices[call_id].take(chunk)
            self._progress[call_id].observe(delta)
            count += bool(delta.token_ids)
            for event in self._writers[call_id].chunks(delta):
                size += len(f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode())
        self._clock.to(None)
        return count, size


def token_request(request: GenerationRequest) -> router_pb2.GenerateTokensRequest:
    """A request as a gateway sends it."""
    return router_pb2.GenerateTokensRequest(
        token_ids=request.prompt_ids,
        prompt_len=len(request.prompt_ids),
        sampling=request.sampling,
        stopping=request.stopping,
        speculation=request.speculation,
        request_id=request.request_id,
    )
