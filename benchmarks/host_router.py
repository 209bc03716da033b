"""Router and gateway as they are, driven without sockets: each takes and gives the bytes of its wires."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any
from unittest.mock import patch

from host_cases import DRAFTS, Case, Clock, Texts

from dflash_ray.core.errors import RequestError
from dflash_ray.gateway.choice import Choice
from dflash_ray.gateway.generation import _Progress
from dflash_ray.gateway.openai_responses import ResponseWriter
from dflash_ray.gateway.openai_types import ChatCompletionRequest
from dflash_ray.gateway.token_chunks import unpack
from dflash_ray.observability.metrics import GatewayMetrics, RouterMetrics
from dflash_ray.pb import drafter_pb2, router_pb2, target_pb2
from dflash_ray.router import ngram_drafts
from dflash_ray.router.actions import Emit
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.outbox import Outbox
from dflash_ray.router.pipeline import Pipeline


def indexed_at_once() -> AbstractContextManager[object]:
    """While it lasts a poll indexes all texts for n-grams, as they are once a server has run for a while."""
    return patch.object(ngram_drafts, "_INDEXED_AT_ONCE", 2**31)


class _Outbox:
    """Stands for a stream or for a request's queue: keeps what it is given."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def send(self, item: Any) -> None:
        self.items.append(item)

    put_nowait = send

    def take(self) -> list[Any]:
        items, self.items = self.items, []
        return items


class Router:
    """Scheduler, pipeline and protobuf of one target group's router."""

    def __init__(self, case: Case, clock: Clock, vocab_size: int) -> None:
        config = case.config()
        self._clock = clock
        self._target, self._gateway = _Outbox(), Outbox()
        self._receiver = _GatewayStream(self._gateway)
        self._pipeline = Pipeline(config, "router", RouterMetrics())
        self._pipeline._target = self._target
        self._drafters = {f"drafter{i}": _Outbox() for i in range(case.num_drafters)}
        self._pipeline._drafters.update(self._drafters)
        target = config.target
        limits = TargetLimits(
            1,
            config.model.max_model_len,
            vocab_size,
            target.page_size,
            target.num_pages,
            target.max_batch_tokens,
            colocated_draft_tokens=DRAFTS if case.is_colocated else 0,
            feature_fingerprint="canned",
        )
        self._pipeline.scheduler.target_ready(limits, time.monotonic())
        for name in self._drafters:
            self._pipeline.scheduler.drafting.join(DrafterState(name, True, DRAFTS))
        self.drafter_names = list(self._drafters)
        self.indexes: dict[int, int] = {}  # sequence id -> number of the request

    def take_requests(self, messages: list[bytes]) -> None:
        for index, message in enumerate(messages):
            request = router_pb2.GenerateTokensRequest.FromString(message)
            self._pipeline.start(request, self._receiver, index)
        self._pipeline._pump()

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

    def to_gateway(self) -> list[bytes]:
        self._clock.to("router chunks")
        messages = []
        while (message := self._gateway.pop()) is not None:
            messages.append(message.SerializeToString())
        self._clock.to(None)
        return messages


class _GatewayStream:
    """The requests' stream, of which each is a call under its own number."""

    number = 1

    def __init__(self, outbox: Outbox) -> None:
        self.emit: Callable[[Emit], None] = outbox.add

    def fail(self, call_id: int, error: RequestError) -> None:
        raise error


class Gateway:
    """Requests out, tokens in, server-sent events out."""

    def __init__(self, case: Case, clock: Clock, texts: Texts) -> None:
        self._clock = clock
        self._texts = texts
        self._requests = [texts.request(index) for index in range(case.sequences)]
        self._choices = [Choice(request, 0, texts.tokenizer) for request in self._requests]
        body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "."}], "stream": True})
        self._writers = [
            ResponseWriter("chat", request.request_id, "model", texts.tokenizer, body, [request])
            for request in self._requests
        ]
        self._progress = [_Progress(GatewayMetrics(), "model") for _ in self._requests]

    @cached_property
    def requests(self) -> list[bytes]:
        """The messages that open the requests at the router."""
        return [
            router_pb2.GenerateTokensRequest(
                token_ids=request.prompt_ids,
                prompt_len=len(request.prompt_ids),
                sampling=request.sampling,
                stopping=request.stopping,
                speculation=request.speculation,
                request_id=request.request_id,
            ).SerializeToString()
            for request in self._requests
        ]

    def take(self, messages: list[bytes]) -> tuple[int, int]:
        """Requests that got tokens, and the bytes that clients get."""
        self._clock.to("gateway")
        count = size = 0
        for data in messages:
            for index, chunk in unpack(router_pb2.RouterResponse.FromString(data).progress):
                if isinstance(chunk, RequestError):
                    raise chunk
                delta = self._choices[index].take(chunk)
                self._progress[index].observe(delta)
                count += 1
                size += len(self._writers[index].events(delta).encode())
        self._clock.to(None)
        return count, size
