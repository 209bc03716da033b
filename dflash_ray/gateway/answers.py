"""Answers over HTTP: the choices of all prompts together, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi.responses import JSONResponse, Response, StreamingResponse

from dflash_ray.core.errors import RequestError
from dflash_ray.gateway.choice import ChoiceDelta
from dflash_ray.gateway.mailbox import Mailbox
from dflash_ray.gateway.openai_responses import Kind, ResponseWriter, error_object, event
from dflash_ray.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from dflash_ray.gateway.parts import GatewayParts
from dflash_ray.gateway.requests import GenerationRequest

logger = logging.getLogger(__name__)
_KEEP_ALIVE = ": keep-alive\n\n"
# Proxies neither store nor collect what is to be read as it comes.
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def answer(
    parts: GatewayParts,
    kind: Kind,
    request_id: str,
    body: ChatCompletionRequest | CompletionRequest,
    generations: Sequence[GenerationRequest],
) -> Response:
    """The response to a checked request. Raises RequestError; a stream that has begun ends with an error event."""
    writer = ResponseWriter(kind, request_id, parts.config.model.served_name, parts.tokenizer, body, generations)
    parallel = parts.config.gateway.parallel_prompts
    batches = _batches(parts, generations, parallel, parts.config.gateway.keepalive_s)
    headers = {"x-request-id": request_id}
    if not body.stream:
        async with aclosing(batches):
            async for batch in batches:
                for delta in batch:
                    writer.add(delta)
        return JSONResponse(writer.whole(), headers=headers)
    # Headers leave when a router has taken the request: what is refused is refused with its status.
    first = await _one_of_each(batches, sum(generation.num_choices for generation in generations[:parallel]))
    events = _events(writer, first, batches)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers | _STREAM_HEADERS)


async def _batches(
    parts: GatewayParts, generations: Sequence[GenerationRequest], parallel: int, silence_s: float
) -> AsyncGenerator[list[ChoiceDelta], None]:
    """Deltas of all prompts of a request, `parallel` of them running at a time, choices numbered through.

    An empty list comes whenever nothing has come for `silence_s`.
    """
    if len(generations) == 1:
        async with aclosing(parts.generator.generate(generations[0], silence_s=silence_s)) as batches:
            async for batch in batches:
                yield batch
        return
    slots = asyncio.Semaphore(parallel)
    mailbox: Mailbox[ChoiceDelta] = Mailbox(silence_s)

    async def run(generation: GenerationRequest, offset: int) -> None:
        try:
            async with slots, aclosing(parts.generator.generate(generation)) as batches:
                async for batch in batches:
                    for delta in batch:
                        delta.index += offset
                        mailbox.put(delta)
        except Exception as error:
            mailbox.put(error)

    tasks, num_running = [], 0
    for generation in generations:
        tasks.append(asyncio.create_task(run(generation, num_running)))
        num_running += generation.num_choices
    try:
        while num_running:
            batch = await mailbox.take()
            num_running -= sum(1 for delta in batch if delta.finish_reason)
            yield batch
    finally:
        mailbox.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one_of_each(batches: AsyncGenerator[list[ChoiceDelta], None], num_choices: int) -> list[ChoiceDelta]:
    """The first deltas, at least one of each choice; a choice's first comes when a router has taken it."""
    first: list[ChoiceDelta] = []
    try:
        while len({delta.index for delta in first}) < num_choices:
            first += await anext(batches)
    except BaseException:
        await batches.aclose()
        raise
    return first


async def _events(
    writer: ResponseWriter, first: list[ChoiceDelta], batches: AsyncGenerator[list[ChoiceDelta], None]
) -> AsyncGenerator[str, None]:
    """Server-sent events, those of a batch together; after an error event nothing follows."""
    try:
        async with aclosing(batches):
            if opening := _text(writer, first):
                yield opening
            async for batch in batches:
                if not batch:
                    yield _KEEP_ALIVE
                elif events := _text(writer, batch):
                    yield events
        for chunk in writer.last_chunks():
            yield event(chunk)
    except RequestError as error:
        yield event(error_object(error))
        return
    except Exception:
        logger.exception("a stream ends with a fault of ours")
        yield event(error_object(RequestError("internal error; the server's log says more")))
        return
    yield "data: [DONE]\n\n"


def _text(writer: ResponseWriter, deltas: Sequence[ChoiceDelta]) -> str:
    return "".join([writer.events(delta) for delta in deltas])
