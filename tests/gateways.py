"""A real gateway in this process: both APIs on real sockets, before a router that answers as a test says."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from unittest import mock

import grpc
import httpx
import uvicorn

from dflash_ray.config import ModelConfig, load_config
from dflash_ray.core.errors import RequestError
from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.core.stats import DecodePass
from dflash_ray.gateway.grpc_api import GenerationServicer
from dflash_ray.gateway.http_api import build_http_app
from dflash_ray.gateway.parts import GatewayParts
from dflash_ray.gateway.token_chunks import TokenChunk
from dflash_ray.pb import common_pb2, generation_pb2_grpc, router_pb2, router_pb2_grpc
from dflash_ray.router.outbox import Outbox
from dflash_ray.rpc.channel import new_server
from dflash_ray.rpc.directory import DirectoryClient, Entry
from dflash_ray.rpc.malformed import RefuseMalformed
from dflash_ray.text.tokenizer import ChatTokenizer
from tests.toy import emit_of


@functools.cache  # the embedded model's takes seconds to read
def _tokenizer(config: str) -> ChatTokenizer:
    return ChatTokenizer(ModelConfig.model_validate_json(config))


def shared_tokenizer(config: ModelConfig) -> ChatTokenizer:
    return _tokenizer(config.model_dump_json())


Respond = Callable[[router_pb2.GenerateTokensRequest], AsyncIterator[TokenChunk]]


def chunk(*token_ids: int, drafted: int | None = None, reason: int = 0) -> TokenChunk:
    """What a pass brings: with `drafted` it is one of the decode phase, whose tokens are drafts but the last."""
    decode_pass = None if drafted is None else DecodePass(drafted, len(token_ids) - 1, drafted)
    return TokenChunk(list(token_ids), reason, decode_pass)


def says(text: str, pass_size: int = 1, end: int = common_pb2.FINISH_REASON_LENGTH) -> Respond:
    """A router whose target always says the same, `pass_size` tokens a pass."""

    async def respond(request: router_pb2.GenerateTokensRequest) -> AsyncIterator[TokenChunk]:
        ids = shared_tokenizer(ModelConfig()).encode(text)[: request.stopping.max_new_tokens]
        yield TokenChunk()
        yield chunk(ids[0], reason=0 if len(ids) > 1 else end)
        for at in range(1, len(ids), pass_size):
            part = ids[at : at + pass_size]
            yield chunk(*part, drafted=pass_size - 1, reason=end if at + pass_size >= len(ids) else 0)

    return respond


@dataclass
class ScriptedRouter(router_pb2_grpc.RouterServicer):
    """Speaks the router's contract; keeps the requests that it got and counts those at work."""

    respond: Respond
    requests: list[router_pb2.GenerateTokensRequest] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0

    async def Generate(self, request_iterator, context):
        outbox, calls = Outbox(), {}

        async def read() -> None:
            async for message in request_iterator:
                for opened in message.open:
                    calls[opened.call_id] = asyncio.create_task(self._answer(opened, outbox))
                for call_id in message.cancel:
                    calls[call_id].cancel()

        reading = asyncio.create_task(read())
        try:
            yield router_pb2.RouterResponse(hello=router_pb2.RouterHello(protocol_version=PROTOCOL_VERSION))
            while True:
                yield await outbox.take()
        finally:
            for task in (reading, *calls.values()):
                task.cancel()

    async def _answer(self, opened: router_pb2.OpenCall, outbox: Outbox) -> None:
        self.requests.append(opened.request)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            async with contextlib.aclosing(self.respond(opened.request)) as parts:
                async for part in parts:
                    outbox.add(emit_of(opened.call_id, part))
        except RequestError as error:
            outbox.add_error(opened.call_id, error)
        except Exception as fault:  # of the test
            outbox.add_error(opened.call_id, RequestError(repr(fault)))
        finally:
            self.num_running -= 1


@dataclass(frozen=True)
class Gateway:
    parts: GatewayParts
    router: ScriptedRouter
    http: httpx.AsyncClient
    http_url: str
    grpc_address: str


@asynccontextmanager
async def gateway(respond: Respond, *overrides: str) -> AsyncIterator[Gateway]:
    """The gateway with the default configuration and `key=value` overrides."""
    router, router_server = ScriptedRouter(respond), grpc.aio.server()
    router_pb2_grpc.add_RouterServicer_to_server(router, router_server)
    router_port = router_server.add_insecure_port("127.0.0.1:0")
    with mock.patch("dflash_ray.gateway.parts.ChatTokenizer", shared_tokenizer):
        parts = GatewayParts(load_config(None, overrides), DirectoryClient())
    parts.routers.update([Entry("router", "r1", f"127.0.0.1:{router_port}", {"ready": True})])
    server = new_server(parts.config.gateway.max_body_bytes, [RefuseMalformed()])
    generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(parts), server)
    port = server.add_insecure_port("127.0.0.1:0")
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    web = uvicorn.Server(uvicorn.Config(build_http_app(lambda: parts), log_level="critical", lifespan="off"))
    await router_server.start()
    await server.start()
    serving = asyncio.create_task(web.serve([listening]))
    try:
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            yield Gateway(parts, router, http, url, f"127.0.0.1:{port}")
    finally:
        web.should_exit = web.force_exit = True
        await serving
        await parts.close()
        await server.stop(0)
        await router_server.stop(0)
