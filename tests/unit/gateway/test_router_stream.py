"""Many answers over one stream to a router, over real gRPC: what ends it costs no token, and no call ends another."""

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from dflash_ray.config import NetworkConfig
from dflash_ray.core.errors import DeadlineExceededError, InvalidRequestError, RequestError, UnavailableError
from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.gateway.routers import Routers
from dflash_ray.gateway.token_chunks import TokenChunk
from dflash_ray.pb import common_pb2, router_pb2, router_pb2_grpc
from dflash_ray.rpc.channel import new_server, start_server
from dflash_ray.rpc.directory import Entry
from tests.directories import LocalDirectory
from tests.gateways import ScriptedRouter, chunk
from tests.toy import STOP_TOKEN, answer
from tests.toy_processes import Cluster, until

LENGTH = common_pb2.FINISH_REASON_LENGTH
NUM_TOKENS = 60
PROMPTS = [[a, b, 3] for a in range(1, 40) for b in range(1, 20)]
ENDLESS = [prompt for prompt in PROMPTS if STOP_TOKEN not in answer(prompt, NUM_TOKENS)]


@dataclass
class Heard:
    """A listener that keeps what it hears."""

    fails_at: int | None = None  # a token that it can make nothing of
    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None
    is_finished: bool = False

    def make(self, chunk: TokenChunk) -> list[int]:
        if self.fails_at in chunk.token_ids:
            raise ArithmeticError("no text")
        return chunk.token_ids

    def on_chunk(self, chunk: TokenChunk, made: list[int]) -> None:
        self.tokens += made
        self.is_finished = bool(chunk.finish_reason)

    def on_failure(self, error: Exception) -> None:
        self.error = error

    @property
    def has_ended(self) -> bool:
        return self.is_finished or self.error is not None


class Router:
    """A scripted router at an address that may be taken again."""

    def __init__(self, respond) -> None:
        self.scripted = ScriptedRouter(respond)

    async def start(self, port: int = 0) -> Entry:
        server = new_server(NetworkConfig().max_message_bytes)
        router_pb2_grpc.add_RouterServicer_to_server(self.scripted, server)
        self._server = await start_server(server, [], "127.0.0.1", port)
        self.port = self._server.port
        return Entry("router", "r", f"127.0.0.1:{self.port}", {"ready": True})

    async def stop(self) -> None:
        await self._server.server.stop(None)


def request(name: str = "r") -> router_pb2.GenerateTokensRequest:
    return router_pb2.GenerateTokensRequest(request_id=name, token_ids=[1, 2], prompt_len=2)


async def counts(request):
    yield TokenChunk(model_fingerprint="m")
    for token in range(5):
        yield chunk(token, reason=LENGTH if token == 4 else 0)


async def says_nothing(request):
    yield TokenChunk(model_fingerprint="m")
    await asyncio.Event().wait()


async def load(cluster: Cluster, count: int) -> list[asyncio.Task]:
    """Answers of which each has begun."""
    tokens: list[list[int]] = [[] for _ in range(count)]
    answers = [
        asyncio.create_task(cluster.generate(prompt, NUM_TOKENS, tokens=kept))
        for prompt, kept in zip(ENDLESS[:count], tokens, strict=True)
    ]
    await until(lambda: all(len(kept) >= 3 for kept in tokens))
    return answers


async def are_right(answers: list[asyncio.Task]) -> None:
    async with asyncio.timeout(60):
        assert await asyncio.gather(*answers) == [answer(prompt, NUM_TOKENS) for prompt in ENDLESS[: len(answers)]]


async def test_all_answers_of_a_gateway_share_one_stream():
    async with Cluster() as cluster:
        router = await cluster.router()
        await cluster.group(step_s=0.02)
        await cluster.led(1)
        answers = await load(cluster, 30)
        assert len(router.servicer._streams) == 1
        await are_right(answers)
        assert len(router.servicer._streams) == 1 and not cluster.num_resumed


async def test_a_stream_that_breaks_in_the_middle_loses_and_doubles_no_token_of_any_answer():
    async with Cluster() as cluster:
        router = await cluster.router()
        await cluster.group(step_s=0.02)
        await cluster.led(1)
        answers = await load(cluster, 30)
        [stream] = router.servicer._streams
        stream.outbox.close()
        await are_right(answers)
        assert cluster.num_resumed == 30
        assert router.servicer._streams and stream not in router.servicer._streams
        await until(lambda: not router.fleet.pipelines[0].load)


async def test_two_gateways_are_served_by_two_routers_of_which_one_dies():
    async with Cluster() as cluster, Cluster() as other:
        first, _second = await cluster.router(), await cluster.router()
        for _ in range(2):
            await cluster.group(step_s=0.02)
        other.directory.plain = cluster.directory.plain
        await cluster.led(1, 1)
        await other.led(1, 1)
        answers = [await load(cluster, 12), await load(other, 12)]
        await until(lambda: len(first.servicer._streams) == 2)
        await first.kill()
        for part in answers:
            await are_right(part)
        assert cluster.num_resumed and other.num_resumed


async def test_calls_over_which_a_router_dies_fail_and_its_successor_at_the_address_takes_new_ones():
    old, new = Router(says_nothing), Router(counts)
    entry = await old.start()
    routers = Routers(LocalDirectory(), NetworkConfig())
    lost = [Heard() for _ in range(3)]
    for heard in lost:
        routers.open(entry, request(), time.monotonic() + 60, heard)
    await until(lambda: old.scripted.num_running == 3)
    await old.stop()
    await until(lambda: all(heard.has_ended for heard in lost))
    assert {type(heard.error) for heard in lost} == {UnavailableError}
    await new.start(old.port)
    heard = Heard()
    num_refused = 0
    while not heard.tokens:
        heard = Heard()
        try:
            routers.open(entry, request(), time.monotonic() + 60, heard)
        except UnavailableError:  # it failed a short while ago, and is left alone
            num_refused += 1
            await asyncio.sleep(0.05)
            continue
        await until(lambda heard=heard: heard.has_ended)
    assert heard.tokens == [0, 1, 2, 3, 4] and num_refused < 60
    await routers.close()
    await new.stop()


async def test_a_call_ends_with_its_deadline_though_the_router_is_silent():
    router = Router(says_nothing)
    entry = await router.start()
    routers = Routers(LocalDirectory(), NetworkConfig())
    hurried, patient = Heard(), Heard()
    routers.open(entry, request(), time.monotonic() + 0.3, hurried)
    routers.open(entry, request(), time.monotonic() + 60, patient)
    await until(lambda: hurried.has_ended)
    assert isinstance(hurried.error, DeadlineExceededError) and not patient.has_ended
    with pytest.raises(DeadlineExceededError):
        routers.open(entry, request(), time.monotonic() - 1, Heard())
    await routers.close()
    await router.stop()


async def test_calls_that_fail_that_are_left_and_that_nothing_can_be_made_of_end_alone():
    async def respond(request):
        yield TokenChunk(model_fingerprint="m")
        if request.request_id == "refused":
            raise InvalidRequestError("is wrong", "prompt")
        for token in range(200):
            yield chunk(token, reason=LENGTH if token == 199 else 0)
            await asyncio.sleep(0.002)

    router = Router(respond)
    entry = await router.start()
    routers = Routers(LocalDirectory(), NetworkConfig())
    heard = {name: Heard(fails_at=7 if name == "odd" else None) for name in ("refused", "left", "odd", "whole")}
    calls = {name: routers.open(entry, request(name), time.monotonic() + 60, one) for name, one in heard.items()}
    await until(lambda: len(heard["left"].tokens) > 3)
    calls["left"].close()
    num_left = len(heard["left"].tokens)
    await until(lambda: heard["odd"].has_ended)
    await until(lambda: router.scripted.num_running == 1)
    await until(lambda: heard["whole"].has_ended)
    assert isinstance(heard["odd"].error, ArithmeticError) and heard["odd"].tokens == list(range(7))
    refusal = heard["refused"].error
    assert isinstance(refusal, RequestError) and (refusal.message, refusal.param) == ("is wrong", "prompt")
    assert len(heard["left"].tokens) == num_left and not heard["left"].has_ended
    assert heard["whole"].tokens == list(range(200))
    await routers.close()
    await router.stop()


class OtherRelease(router_pb2_grpc.RouterServicer):
    async def Generate(self, request_iterator, context):
        yield router_pb2.RouterResponse(hello=router_pb2.RouterHello(protocol_version=PROTOCOL_VERSION + 1))
        await asyncio.Event().wait()


async def test_a_router_of_another_release_is_left_and_the_error_says_so():
    server = new_server(NetworkConfig().max_message_bytes)
    router_pb2_grpc.add_RouterServicer_to_server(OtherRelease(), server)
    running = await start_server(server, [], "127.0.0.1", 0)
    entry = Entry("router", "r", f"127.0.0.1:{running.port}", {"ready": True})
    routers, heard = Routers(LocalDirectory(), NetworkConfig()), Heard()
    routers.open(entry, request(), time.monotonic() + 60, heard)
    await until(lambda: heard.has_ended)
    assert isinstance(heard.error, UnavailableError) and f"protocol {PROTOCOL_VERSION + 1}" in heard.error.message
    await routers.close()
    await running.stop()
