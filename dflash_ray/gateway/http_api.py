"""The OpenAI-compatible HTTP API: its routes, and every error as OpenAI's error object."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from dflash_ray import __version__
from dflash_ray.core.errors import InvalidRequestError, RequestError, TooLargeError, UnavailableError
from dflash_ray.gateway.answers import answer
from dflash_ray.gateway.bodies import Model, check, parse_json
from dflash_ray.gateway.cors import Cors
from dflash_ray.gateway.openai_responses import error_object
from dflash_ray.gateway.openai_types import (
    WITHOUT_EFFECT,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeBody,
    TokenizeBody,
)
from dflash_ray.gateway.parts import GatewayParts
from dflash_ray.observability.logs import request_id_var

logger = logging.getLogger(__name__)
_READ = ["GET", "HEAD"]
_MAX_REQUEST_ID = 128


def build_http_app(get_parts: Callable[[], GatewayParts]) -> FastAPI:
    """The application; `get_parts` is asked anew for every request, because Serve builds the app before the replica."""
    app = FastAPI(title="dflash_ray", version=__version__, docs_url=None, redoc_url=None)

    def cors(inner: ASGIApp) -> Cors:
        return Cors(inner, lambda: get_parts().config.gateway.cors)

    app.add_middleware(cors)
    app.add_exception_handler(RequestError, _handle_error)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_found)
    app.add_exception_handler(Exception, _handle_fault)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        parts, request_id = _begin(request, get_parts)
        body = await _read(request, ChatCompletionRequest, parts)
        parts.requests.check_model(body.model)
        generation = await parts.in_thread(parts.requests.from_chat, body, request_id)
        return await answer(parts, "chat", request_id, body, [generation])

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        parts, request_id = _begin(request, get_parts)
        body = await _read(request, CompletionRequest, parts)
        parts.requests.check_model(body.model)
        generations = await parts.in_thread(parts.requests.from_completion, body, request_id)
        return await answer(parts, "completion", request_id, body, generations)

    @app.api_route("/v1/models", methods=_READ)
    async def models() -> dict[str, Any]:
        parts = get_parts()
        return {"object": "list", "data": [_model(parts, name) for name in parts.config.model.served_names]}

    @app.api_route("/v1/models/{model:path}", methods=_READ)
    async def model(model: str) -> dict[str, Any]:
        parts = get_parts()
        parts.requests.check_model(model)
        return _model(parts, model)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        parts, _ = _begin(request, get_parts)
        body = await _read(request, TokenizeBody, parts)
        parts.requests.check_model(body.model)
        return await parts.in_thread(_tokenize, parts, body)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        parts, _ = _begin(request, get_parts)
        body = await _read(request, DetokenizeBody, parts)
        parts.requests.check_model(body.model)
        return await parts.in_thread(_detokenize, parts, body)

    @app.api_route("/health", methods=_READ)
    async def health() -> Response:
        if not get_parts().routers.has_ready:
            raise UnavailableError("no router leads a target group yet")
        return Response(status_code=200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(await get_parts().render_metrics(), media_type="text/plain; version=0.0.4")

    return app


def _begin(request: Request, get_parts: Callable[[], GatewayParts]) -> tuple[GatewayParts, str]:
    request_id = request.headers.get("x-request-id", "")[:_MAX_REQUEST_ID] or uuid.uuid4().hex
    request_id_var.set(request_id)
    return get_parts(), request_id


async def _read(request: Request, model: type[Model], parts: GatewayParts) -> Model:
    """The checked body. Raises RequestError that names the field."""
    limit = parts.config.gateway.max_body_bytes
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            parts.metrics.refused.labels("request_too_large").inc()
            raise TooLargeError(f"the body is over {limit} bytes; send a shorter prompt")
    return await parts.in_thread(_parse, parts, bytes(data), model)


def _parse(parts: GatewayParts, data: bytes, model: type[Model]) -> Model:
    values = parse_json(data)
    parts.requests.check_size(values)
    body = check(model, values)
    parts.unknown_fields.log(values, model, WITHOUT_EFFECT)
    return body


def _tokenize(parts: GatewayParts, body: TokenizeBody) -> Response:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", "prompt")
    if body.messages is not None:
        messages = [message.as_template_message() for message in body.messages]
        ids = parts.tokenizer.encode_chat(messages, body.chat_template_kwargs)
    else:
        ids = parts.tokenizer.encode(body.prompt or "", body.add_special_tokens)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": parts.requests.max_model_len}
    if body.return_token_strs:
        answer["token_strs"] = [parts.tokenizer.token_text(token) for token in ids]
    return JSONResponse(answer)


def _detokenize(parts: GatewayParts, body: DetokenizeBody) -> Response:
    if any(token >= parts.tokenizer.vocab_size for token in body.tokens):
        raise InvalidRequestError(f"token ids must be below {parts.tokenizer.vocab_size}", "tokens")
    return JSONResponse({"prompt": parts.tokenizer.decode(body.tokens)})


def _model(parts: GatewayParts, name: str) -> dict[str, Any]:
    config = parts.config.model
    return {
        "id": name,
        "object": "model",
        "created": parts.started_at,
        "owned_by": "dflash_ray",
        "root": config.path,
        "max_model_len": parts.requests.max_model_len,
    }


async def _handle_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error_object(error), error.http_status, headers)


async def _handle_fault(request: Request, error: Exception) -> Response:
    """A fault of ours; it is raised on, and logged, after this answer."""
    return JSONResponse(error_object(RequestError("internal error; the server's log says more")), 500)


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = f"{request.method} {request.url.path} is not served here"
    code = "method_not_allowed" if status == 405 else "not_found"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(body, status, getattr(error, "headers", None))
