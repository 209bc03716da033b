"""The Generation gRPC service: the same requests as over HTTP, with the client's deadline and cancellation."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from dflash_ray import __version__
from dflash_ray.core.errors import InvalidRequestError, RequestError
from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.gateway.choice import ChoiceDelta
from dflash_ray.gateway.openai_responses import speculation_metrics
from dflash_ray.gateway.parts import GatewayParts
from dflash_ray.gateway.requests import grpc_messages, grpc_template_variables
from dflash_ray.observability.logs import request_id_var
from dflash_ray.pb import generation_pb2, generation_pb2_grpc

logger = logging.getLogger(__name__)

_Method = Callable[[Any, Any, grpc.aio.ServicerContext], Awaitable[Any]]


def _with_status(method: _Method) -> _Method:
    """Ends a call that fails with the error's status; its text names the field."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:
            await _abort(context, error)

    return call


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    if not isinstance(error, RequestError):
        logger.error("a call ends with a fault of ours", exc_info=error)
        error = RequestError("internal error; the server's log says more")
    await context.abort(getattr(grpc.StatusCode, error.grpc_code), str(error))


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """Converts between the wire and the gateway's parts."""

    def __init__(self, parts: GatewayParts) -> None:
        self._parts = parts

    @_with_status
    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        whole: dict[int, generation_pb2.SequenceOutput] = {}
        answer = generation_pb2.GenerateResponse()
        async for response in self._responses(request, context):
            for output in response.outputs:
                kept = whole.setdefault(output.index, generation_pb2.SequenceOutput())
                text, num_tokens = kept.text + output.text, kept.num_tokens + output.num_tokens
                kept.MergeFrom(output)  # appends the lists, and replaces what is set next
                kept.text, kept.num_tokens = text, num_tokens
            answer.request_id, answer.num_prompt_tokens = response.request_id, response.num_prompt_tokens
            answer.num_cached_tokens = response.num_cached_tokens
            answer.speculative_decoding.CopyFrom(response.speculative_decoding)
        answer.outputs.extend(whole[index] for index in sorted(whole))
        return answer

    async def GenerateStream(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        try:
            async for response in self._responses(request, context):
                yield response
        except Exception as error:
            await _abort(context, error)

    async def _responses(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        request_id = request.request_id or uuid.uuid4().hex
        request_id_var.set(request_id)
        generation = await self._parts.in_thread(self._parts.requests.from_grpc, request, request_id)
        batches = self._parts.generator.generate(generation, context.time_remaining())
        writer = _OutputWriter(request.response, generation.num_choices)
        is_taken = False
        num_cached: dict[int, int] = {}
        async with aclosing(batches):
            async for delta in _each(batches):
                if not delta.token_ids and not delta.finish_reason:
                    if not is_taken:  # by a router: a client that waits for its answer knows that it will come
                        await context.send_initial_metadata(())
                    is_taken = True
                    continue
                if delta.num_cached_tokens is not None:
                    num_cached[delta.index] = delta.num_cached_tokens
                response = generation_pb2.GenerateResponse(
                    request_id=request_id,
                    num_prompt_tokens=len(generation.prompt_ids),
                    num_cached_tokens=min(num_cached.values(), default=0),
                    outputs=[writer.output(delta)],
                )
                if delta.stats is not None and generation.num_choices == 1:
                    response.speculative_decoding.CopyFrom(_speculation(delta.stats))
                yield response

    @_with_status
    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.TokenizeResponse:
        self._parts.requests.check_model(request.model)
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequestError("give a prompt: text or chat", "prompt")
        return await self._parts.in_thread(self._tokenize, request, kind)

    def _tokenize(self, request: generation_pb2.TokenizeRequest, kind: str) -> generation_pb2.TokenizeResponse:
        tokenizer, chat = self._parts.tokenizer, request.chat
        if kind == "text":
            adds_special_tokens = request.add_special_tokens or not request.HasField("add_special_tokens")
            ids = tokenizer.encode(request.text, adds_special_tokens)
        else:
            ids = tokenizer.encode_chat(grpc_messages(chat), grpc_template_variables(chat))
        return generation_pb2.TokenizeResponse(token_ids=ids, max_model_len=self._parts.requests.max_model_len)

    @_with_status
    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.DetokenizeResponse:
        self._parts.requests.check_model(request.model)
        return await self._parts.in_thread(self._detokenize, request)

    def _detokenize(self, request: generation_pb2.DetokenizeRequest) -> generation_pb2.DetokenizeResponse:
        vocab_size = self._parts.tokenizer.vocab_size
        if any(token >= vocab_size for token in request.token_ids):
            raise InvalidRequestError(f"token ids must be below {vocab_size}", "token_ids")
        return generation_pb2.DetokenizeResponse(text=self._parts.tokenizer.decode(request.token_ids))

    @_with_status
    async def ModelInfo(
        self, request: generation_pb2.ModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.ModelInfoResponse:
        self._parts.requests.check_model(request.model)
        config = self._parts.config
        return generation_pb2.ModelInfoResponse(
            model=config.model.served_name,
            max_model_len=self._parts.requests.max_model_len,
            vocab_size=self._parts.tokenizer.vocab_size,
            drafter_method=config.drafter.method,
            default_draft_tokens=config.router.draft_tokens,
            version=__version__,
        )


async def _each(batches: AsyncIterator[list[ChoiceDelta]]) -> AsyncIterator[ChoiceDelta]:
    async for batch in batches:
        for delta in batch:
            yield delta


class _OutputWriter:
    """Deltas as SequenceOutput messages, by what the client asked to see."""

    def __init__(self, options: generation_pb2.ResponseOptions, num_choices: int) -> None:
        self._with_text = options.output_text or not options.HasField("output_text")
        self._with_ids = options.output_token_ids
        self._num_tokens = [0] * num_choices

    def output(self, delta: ChoiceDelta) -> generation_pb2.SequenceOutput:
        self._num_tokens[delta.index] += len(delta.token_ids)
        output = generation_pb2.SequenceOutput(
            index=delta.index,
            text=delta.text if self._with_text else "",
            num_tokens=len(delta.token_ids),
            token_ids=delta.token_ids if self._with_ids else (),
            logprobs=delta.logprobs,
        )
        if delta.finish_reason:
            output.finish_info.num_output_tokens = self._num_tokens[delta.index]
            output.finish_info.finish_reason = delta.finish_reason
            if isinstance(delta.stop, str):
                output.finish_info.stop_string = delta.stop
            elif delta.stop is not None:
                output.finish_info.stop_token_id = delta.stop
        return output


def _speculation(stats: AcceptanceStats) -> generation_pb2.SpeculativeDecodingMetrics:
    return generation_pb2.SpeculativeDecodingMetrics(**(speculation_metrics(stats) or {}))
