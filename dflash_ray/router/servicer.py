"""The Router gRPC service: one server-streaming call a request; cancelling the call frees the sequence."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import grpc

from dflash_ray.core.errors import HandedOverError, InvalidRequestError, RequestError
from dflash_ray.observability.logs import request_id_var
from dflash_ray.pb import router_pb2, router_pb2_grpc
from dflash_ray.router.fleet import Fleet
from dflash_ray.router.pipeline import to_chunk


class RouterServicer(router_pb2_grpc.RouterServicer):
    """Hands requests to the fleet's pipelines."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def Generate(
        self, request: router_pb2.GenerateTokensRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.TokenChunk]:
        request_id_var.set(request.request_id)
        try:
            _check(request)
            pipeline = await self._fleet.pick(request.model_fingerprint)
            fingerprint = pipeline.model_fingerprint
            emits = pipeline.generate(request)
            try:
                async for emit in emits:
                    chunk = to_chunk(emit.sequence, emit, time.monotonic())
                    chunk.model_fingerprint, fingerprint = fingerprint, ""
                    yield chunk
            finally:
                await emits.aclose()
        except RequestError as error:
            if isinstance(error, HandedOverError) and error.num_losses:
                yield router_pb2.TokenChunk(num_losses=error.num_losses)
            await context.abort(getattr(grpc.StatusCode, error.grpc_code), error.message)


def _check(request: router_pb2.GenerateTokensRequest) -> None:
    if not 0 < request.prompt_len <= len(request.token_ids):
        raise InvalidRequestError("prompt_len must lie between 1 and the number of token_ids", "prompt_len")
    if not request.stopping.max_new_tokens:
        raise InvalidRequestError("max_new_tokens must be at least 1", "max_new_tokens")
