"""The OpenAI-compatible HTTP API: reads bodies, streams answers, turns every error into OpenAI's error object."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError

from dflash_ray import __version__
from dflash_ray.core.errors import InvalidRequestError, RequestError, TooLargeError, UnavailableError
from dflash_ray.gateway.core import GatewayCore
from dflash_ray.gateway.generation import ChoiceDelta
from dflash_ray.gateway.openai_responses import Kind, ResponseWriter
from dflash_ray.gateway.openai_types import ChatCompletionRequest, CompletionRequest, DetokenizeBody, TokenizeBody
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.observability.logs import request_id_var

Body = TypeVar("Body", bound=BaseModel)


def build_http_app(get_core: Callable[[], GatewayCore]) -> FastAPI:
    """The application; `get_core` is asked anew for every request, because Serve builds the app before the replica."""
    app = FastAPI(title="dflash_ray", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestError, _handle_error)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_found)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        core, request_id = _begin(request, get_core)
        body = await _read(request, ChatCompletionRequest, core)
        core.requests.check_model(body.model)
        generation = core.requests.from_chat(body, request_id)
        return await _answer(core, "chat", request_id, body, [generation])

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        core, request_id = _begin(request, get_core)
        body = await _read(request, CompletionRequest, core)
        core.requests.check_model(body.model)
        generations = core.requests.from_completion(body, request_id)
        return await _answer(core, "completion", request_id, body, generations)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(get_core())]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        core = get_core()
        core.requests.check_model(model)
        return _model(core)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        core, _ = _begin(request, get_core)
        body = await _read(request, TokenizeBody, core)
        core.requests.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        if body.messages is not None:
            ids = core.tokenizer.encode_chat([message.as_template_message() for message in body.messages])
        else:
            ids = core.tokenizer.encode(body.prompt or "")
        answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": core.config.model.max_model_len}
        if body.return_token_strs:
            answer["token_strs"] = [core.tokenizer.token_text(token) for token in ids]
        return answer

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, str]:
        core, _ = _begin(request, get_core)
        body = await _read(request, DetokenizeBody, core)
        core.requests.check_model(body.model)
        if any(token >= core.tokenizer.vocab_size for token in body.tokens):
            raise InvalidRequestError(f"token ids must be below {core.tokenizer.vocab_size}", "tokens")
        return {"prompt": core.tokenizer.decode(body.tokens)}

    @app.get("/health")
    async def health() -> Response:
        if not get_core().routers.has_ready:
            raise UnavailableError("no router leads a target group yet")
        return Response(status_code=200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(await get_core().render_metrics(), media_type="text/plain; version=0.0.4")

    return app


def _begin(request: Request, get_core: Callable[[], GatewayCore]) -> tuple[GatewayCore, str]:
    request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
    request_id_var.set(request_id)
    return get_core(), request_id


async def _read(request: Request, model: type[Body], core: GatewayCore) -> Body:
    """The checked body. Raises RequestError that names the field."""
    limit = core.config.gateway.max_body_bytes
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            core.metrics.refused.labels("request_too_large").inc()
            raise TooLargeError(f"the body is over {limit} bytes; send a shorter prompt")
    try:
        values = json.loads(data.decode())
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not valid UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    try:
        return model.model_validate(values, strict=False)
    except ValidationError as error:
        raise _validation_error(error) from None


def _validation_error(error: ValidationError) -> InvalidRequestError:
    """The first fault, in words; a field that is not known counts as one that cannot be honoured."""
    item = error.errors(include_url=False, include_input=False)[0]
    name = (
        ".".join(str(part) for part in item["loc"] if not str(part).startswith(("list[", "str", "constrained")))
        or "body"
    )
    if item["type"] == "extra_forbidden":
        return InvalidRequestError(f"{name}: this field is not supported here; leave it out", name)
    return InvalidRequestError(f"{name}: {item['msg']}", name)


async def _answer(
    core: GatewayCore,
    kind: Kind,
    request_id: str,
    body: ChatCompletionRequest | CompletionRequest,
    generations: list[GenerationRequest],
) -> Response:
    num_prompt_tokens = sum(len(generation.prompt_ids) for generation in generations)
    num_choices = sum(generation.num_choices for generation in generations)
    model = core.config.model.served_name
    writer = ResponseWriter(
        kind, request_id, model, core.tokenizer, num_prompt_tokens, num_choices, body.return_token_ids
    )
    deltas = _all_deltas(core, generations)
    headers = {"x-request-id": request_id}
    if not body.stream:
        async for delta in deltas:
            writer.add(delta)
        return JSONResponse(writer.whole(), headers=headers)
    # The first delta is awaited here, so that what is refused is refused with its status and not in a stream.
    first = await anext(deltas)
    options = body.stream_options
    stream = _events(kind, writer, first, deltas, num_choices, options is not None and options.include_usage)
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


async def _all_deltas(core: GatewayCore, generations: list[GenerationRequest]) -> AsyncGenerator[ChoiceDelta, None]:
    """Deltas of all prompts of a request, one prompt after the other, choices numbered through."""
    offset = 0
    for generation in generations:
        deltas = core.generator.generate(generation)
        try:
            async for delta in deltas:
                delta.index += offset
                yield delta
        finally:
            await deltas.aclose()
        offset += generation.num_choices


async def _events(
    kind: Kind,
    writer: ResponseWriter,
    first: ChoiceDelta,
    deltas: AsyncGenerator[ChoiceDelta, None],
    num_choices: int,
    with_usage: bool,
) -> AsyncGenerator[str, None]:
    """Server-sent events; an error after the start comes as an event, then the stream ends."""
    opened: set[int] = set()
    num_finished = 0
    try:
        delta: ChoiceDelta | None = first
        while delta is not None:
            writer.add(delta)
            if kind == "chat" and delta.index not in opened:
                opened.add(delta.index)
                yield _event(writer.first_chunk(delta.index))
            num_finished += bool(delta.finish_reason)
            if delta.text or delta.finish_reason or delta.logprobs is not None:
                yield _event(writer.chunk(delta, num_finished == num_choices))
            delta = await anext(deltas, None)
        if with_usage:
            yield _event(writer.usage_chunk())
    except RequestError as error:
        yield _event(error_object(error))
    finally:
        await deltas.aclose()
    yield "data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _model(core: GatewayCore) -> dict[str, Any]:
    config = core.config.model
    return {
        "id": config.served_name,
        "object": "model",
        "created": core.started_at,
        "owned_by": "dflash_ray",
        "root": config.path,
        "max_model_len": config.max_model_len,
    }


def error_object(error: RequestError) -> dict[str, Any]:
    """OpenAI's error body."""
    message = (
        error.message if error.param is None or error.param in error.message else f"{error.param}: {error.message}"
    )
    return {"error": {"message": message, "type": error.kind, "param": error.param, "code": error.http_status}}


async def _handle_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error_object(error), status_code=error.http_status)


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = f"{request.method} {request.url.path} is not served here"
    return JSONResponse({"error": {"message": message, "type": "not_found", "param": None, "code": status}}, status)
