"""A message that cannot be parsed is the caller's fault: INVALID_ARGUMENT, and no traceback in the log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """For calls with one request; a stream of requests is parsed as it is read."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        parse = handler.request_deserializer

        def try_parse(data: bytes) -> Any:
            try:
                return parse(data)
            except DecodeError as error:
                return error

        if handler.response_streaming:
            return handler._replace(request_deserializer=try_parse, unary_stream=_stream(handler.unary_stream))
        return handler._replace(request_deserializer=try_parse, unary_unary=_unary(handler.unary_unary))


async def _refuse(context: grpc.aio.ServicerContext, error: DecodeError) -> None:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def _unary(behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, DecodeError):
            await _refuse(context, request)
        return await behavior(request, context)

    return call


def _stream(behavior: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        if isinstance(request, DecodeError):
            await _refuse(context, request)
        async for response in behavior(request, context):
            yield response

    return call
