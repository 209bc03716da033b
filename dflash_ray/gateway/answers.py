"""Answers over HTTP: the choices of all prompts together, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from dflash_ray.core.errors import RequestError
from dflash_ray.gateway.choice import ChoiceDelta
from dflash_ray.gateway.core import GatewayCore
from dflash_ray.gateway.generation import merge
from dflash_ray.gateway.openai_responses import Kind, ResponseWriter, error_object
from dflash_ray.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from dflash_ray.gateway.requests import GenerationRequest

logger = logging.getLogger(__name__)
_KEEP_ALIVE = ": keep-alive\n\n"
# Proxies neither store nor collect what is to be read as it comes.
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def answer(
    core: GatewayCore,
    kind: Kind,
    request_id: str,
    body: ChatCompletionRequest | CompletionRequest,
    generations: Sequence[GenerationRequest],
) -> Response:
    """The response to a checked request. Raises RequestError; a stream that has begun ends with an error event."""
    writer = ResponseWriter(kind, request_id, core.config.model.served_name, core.tokenizer, body, generations)
    parallel = core.config.gateway.parallel_prompts
    deltas = _deltas(core, generations, parallel)
    headers = {"x-request-id": request_id}
    if not body.stream:
        async with aclosing(deltas):
            async for delta in deltas:
                writer.add(delta)
        return JSONResponse(writer.whole(), headers=headers)
    # Headers leave when a router has taken the request: what is refused is refused with its status.
    first = await _one_of_each(deltas, sum(generation.num_choices for generation in generations[:parallel]))
    paced = _paced(first, deltas, core.config.gateway.keepalive_s)
    return StreamingResponse(_events(writer, paced), media_type="text/event-stream", headers=headers | _STREAM_HEADERS)


async def _deltas(
    core: GatewayCore, generations: Sequence[GenerationRequest], parallel: int
) -> AsyncGenerator[ChoiceDelta, None]:
    """Deltas of all prompts of a request, `parallel` of them running at a time, choices numbered through."""
    slots = asyncio.Semaphore(parallel)

    async def one(generation: GenerationRequest, offset: int) -> AsyncGenerator[ChoiceDelta, None]:
        async with slots, aclosing(core.generator.generate(generation)) as deltas:
            async for delta in deltas:
                delta.index += offset
                yield delta

    sources, offset = [], 0
    for generation in generations:
        sources.append(one(generation, offset))
        offset += generation.num_choices
    async with aclosing(merge(sources)) as merged:
        async for delta in merged:
            yield delta


async def _one_of_each(deltas: AsyncGenerator[ChoiceDelta, None], num_choices: int) -> list[ChoiceDelta]:
    """The first deltas, at least one of each choice; a choice's first comes when a router has taken it."""
    first: list[ChoiceDelta] = []
    seen: set[int] = set()
    try:
        while len(seen) < num_choices:
            first.append(await anext(deltas))
            seen.add(first[-1].index)
    except BaseException:
        await deltas.aclose()
        raise
    return first


async def _paced(
    first: Sequence[ChoiceDelta], deltas: AsyncGenerator[ChoiceDelta, None], silence_s: float
) -> AsyncGenerator[ChoiceDelta | None, None]:
    """The deltas, and None whenever none has come for `silence_s`."""
    coming: asyncio.Future[ChoiceDelta | None] | None = None
    try:
        for delta in first:
            yield delta
        while True:
            coming = asyncio.ensure_future(anext(deltas, None))
            while not (await asyncio.wait({coming}, timeout=silence_s))[0]:
                yield None
            following = coming.result()
            if following is None:
                return
            yield following
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await deltas.aclose()


async def _events(
    writer: ResponseWriter, deltas: AsyncGenerator[ChoiceDelta | None, None]
) -> AsyncGenerator[str, None]:
    """Server-sent events; after an error event nothing follows."""
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                if delta is None:
                    yield _KEEP_ALIVE
                    continue
                for chunk in writer.chunks(delta):
                    yield _event(chunk)
        for chunk in writer.last_chunks():
            yield _event(chunk)
    except RequestError as error:
        yield _event(error_object(error))
        return
    except Exception:
        logger.exception("a stream ends with a fault of ours")
        yield _event(error_object(RequestError("internal error; the server's log says more")))
        return
    yield "data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"
