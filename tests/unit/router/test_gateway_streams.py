"""A gateway's stream at a router, over real gRPC: many calls in it, each of which ends alone."""

import asyncio
import contextlib
from collections import defaultdict

import grpc
import pytest

from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.pb import common_pb2, router_pb2, router_pb2_grpc
from tests.toy import STOP_TOKEN, answer
from tests.toy_processes import Cluster, until

LENGTH = common_pb2.FINISH_REASON_LENGTH
PROMPTS = [[a, b, 3] for a in range(1, 40) for b in range(1, 40)]


def endless(max_new: int) -> list[list[int]]:
    """Prompts whose answers do not end by themselves."""
    return [prompt for prompt in PROMPTS if STOP_TOKEN not in answer(prompt, max_new)]


class RawGateway:
    """A client of the Router service that keeps what it is told of each call."""

    def __init__(self, address: str, version: int = PROTOCOL_VERSION) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._outgoing: asyncio.Queue[router_pb2.RouterRequest] = asyncio.Queue()
        self._outgoing.put_nowait(router_pb2.RouterRequest(hello=router_pb2.GatewayHello(protocol_version=version)))
        self.stream = router_pb2_grpc.RouterStub(self._channel).Generate(self._messages())
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, int | router_pb2.CallError] = {}
        self.models: dict[int, str] = {}
        self.num_messages = 0

    async def _messages(self):
        while True:
            yield await self._outgoing.get()

    def open(self, prompts: dict[int, list[int]], max_new: int = 20, timeout_s: float = 60.0, **changes) -> None:
        message = router_pb2.RouterRequest()
        for call_id, prompt in prompts.items():
            request = router_pb2.GenerateTokensRequest(
                token_ids=prompt,
                prompt_len=len(prompt),
                stopping=common_pb2.StoppingParams(max_new_tokens=max_new),
                speculation=router_pb2.Speculation(policy=router_pb2.SPECULATION_POLICY_OFF),
            )
            request.MergeFrom(router_pb2.GenerateTokensRequest(**changes))
            message.open.add(call_id=call_id, timeout_ms=int(timeout_s * 1000), request=request)
        self._outgoing.put_nowait(message)

    def cancel(self, *call_ids: int) -> None:
        self._outgoing.put_nowait(router_pb2.RouterRequest(cancel=call_ids))

    async def read(self, num_ends: int) -> None:
        """Reads until so many calls have ended."""
        async with asyncio.timeout(60):
            while len(self.ends) < num_ends:
                message = await self.stream.read()
                assert message is not grpc.aio.EOF
                if message.WhichOneof("message") == "hello":
                    assert message.hello.protocol_version == PROTOCOL_VERSION
                else:
                    self._take(message.progress)

    def _take(self, progress: router_pb2.Progress) -> None:
        self.num_messages += 1
        tokens = list(memoryview(progress.token_ids).cast("I"))
        extras = {extra.entry: extra for extra in progress.extras}
        for entry, (call_id, count) in enumerate(zip(progress.call_ids, progress.num_tokens, strict=True)):
            assert call_id not in self.ends, "nothing follows a call's last entry"
            if call_id not in self.models and not extras[entry].HasField("error"):
                assert not count
                self.models[call_id] = extras[entry].model_fingerprint
            self.tokens[call_id] += tokens[:count]
            tokens = tokens[count:]
            if progress.finish_reasons[entry]:
                self.ends[call_id] = progress.finish_reasons[entry]
            elif entry in extras and extras[entry].HasField("error"):
                self.ends[call_id] = extras[entry].error

    async def close(self) -> None:
        self.stream.cancel()
        await self._channel.close()


@contextlib.asynccontextmanager
async def router_of(*overrides: str, step_s: float = 0.01):
    """A router that leads a toy group, and what opens gateways to it."""
    async with Cluster(*overrides) as cluster, contextlib.AsyncExitStack() as closing:
        router = await cluster.router()
        await cluster.group(step_s=step_s)
        await until(lambda: router.fleet.led)

        def gateway(**options) -> RawGateway:
            made = RawGateway(router.address, **options)
            closing.push_async_callback(made.close)
            return made

        yield router, gateway


async def test_a_thousand_calls_that_are_opened_at_once_get_their_own_tokens_in_few_messages():
    prompts = dict(enumerate(PROMPTS[:1000], start=1))
    async with router_of("router.max_waiting=1000") as (_, gateway_to):
        gateway = gateway_to()
        gateway.open(prompts, max_new=5)
        await gateway.read(1000)
    assert gateway.tokens == {call_id: answer(prompt, 5) for call_id, prompt in prompts.items()}
    assert set(gateway.models.values()) == {"toy"} and len(gateway.models) == 1000
    assert gateway.num_messages < 1000


async def test_a_call_that_is_cancelled_and_calls_that_are_wrong_end_alone():
    first, second, third, *_ = endless(150)
    async with router_of(step_s=0.02) as (router, gateway_to):
        gateway = gateway_to()
        gateway.open({1: first, 2: second}, max_new=60)
        gateway.open({3: third}, max_new=150)
        gateway.open({4: third}, prompt_len=99)
        gateway.open({5: [1, 2, 99_999]})
        gateway.open({6: third}, model_fingerprint="another")
        await gateway.read(3)
        gateway.cancel(3, 77)
        await gateway.read(5)
        pipeline = router.fleet.pipelines[0]
        await until(lambda: not pipeline.load)
    assert gateway.ends[1] == gateway.ends[2] == LENGTH
    assert (gateway.tokens[1], gateway.tokens[2]) == (answer(first, 60), answer(second, 60))
    assert 3 not in gateway.ends
    errors = {call_id: (gateway.ends[call_id].code, gateway.ends[call_id].field) for call_id in (4, 5, 6)}
    assert errors == {
        4: ("INVALID_ARGUMENT", "prompt_len"), 5: ("INVALID_ARGUMENT", "prompt"), 6: ("FAILED_PRECONDITION", "")
    }  # fmt: skip


async def test_a_call_ends_with_its_requests_deadline_wherever_it_is():
    first, second, *_ = endless(150)
    async with router_of(step_s=0.05) as (router, gateway_to):
        gateway = gateway_to()
        gateway.open({1: first}, max_new=150, timeout_s=0.5)
        gateway.open({2: second}, max_new=20)
        await gateway.read(2)
        await until(lambda: not router.fleet.pipelines[0].load)
    assert gateway.ends[1].code == "DEADLINE_EXCEEDED" and gateway.ends[2] == LENGTH
    assert gateway.tokens[1] == answer(first, 150)[: len(gateway.tokens[1])] != []
    async with Cluster() as cluster:
        alone = await cluster.router()  # no group comes
        gateway = RawGateway(alone.address)
        gateway.open({1: first}, timeout_s=0.3)
        await gateway.read(1)
        await gateway.close()
    assert gateway.ends[1].code == "DEADLINE_EXCEEDED"


async def test_a_stream_that_is_closed_frees_its_sequences_and_no_others():
    first, second, third, *_ = endless(150)
    async with router_of(step_s=0.02) as (router, gateway_to):
        leaving, staying = gateway_to(), gateway_to()
        leaving.open({1: first, 2: second}, max_new=150)
        staying.open({1: third}, max_new=60)
        pipeline_load = lambda: sum(pipeline.load for pipeline in router.fleet.pipelines)  # noqa: E731
        await until(lambda: pipeline_load() == 3)
        await leaving.close()
        await until(lambda: pipeline_load() == 1)
        await staying.read(1)
    assert staying.tokens[1] == answer(third, 60)


async def test_a_gateway_that_does_not_read_holds_up_nobody_and_loses_nothing():
    prompts = dict(enumerate(endless(150)[:40], start=1))
    async with router_of() as (router, gateway_to):
        slow, quick = gateway_to(), gateway_to()
        slow.open(prompts, max_new=150)
        await until(lambda: sum(pipeline.load for pipeline in router.fleet.pipelines) == 40)
        quick.open(prompts, max_new=20)
        await quick.read(40)
        await until(lambda: not router.fleet.pipelines[0].load)
        await slow.read(40)
    assert quick.tokens == {call_id: answer(prompt, 20) for call_id, prompt in prompts.items()}
    assert slow.tokens == {call_id: answer(prompt, 150) for call_id, prompt in prompts.items()}


async def test_a_router_that_is_stopped_hands_its_calls_over_and_ends_its_streams():
    first, second, *_ = endless(150)
    async with router_of(step_s=0.02) as (router, gateway_to):
        gateway = gateway_to()
        gateway.open({1: first, 2: second}, max_new=150)
        await until(lambda: router.fleet.pipelines[0].load == 2)
        await router.stop()
        await gateway.read(2)
        assert {error.code for error in gateway.ends.values()} == {"UNAVAILABLE"}
        async with asyncio.timeout(10):
            assert await gateway.stream.read() is grpc.aio.EOF


@pytest.mark.parametrize(
    ("spoil", "code", "text"),
    [
        ("version", grpc.StatusCode.FAILED_PRECONDITION, "run one release everywhere"),
        ("id", grpc.StatusCode.INVALID_ARGUMENT, "call_id 1 is in use"),
    ],
)
async def test_a_gateway_that_breaks_the_contract_is_told_why_its_stream_ends(spoil, code, text):
    async with router_of() as (router, gateway_to):
        gateway = gateway_to(version=PROTOCOL_VERSION - 1 if spoil == "version" else PROTOCOL_VERSION)
        gateway.open({1: endless(150)[0]}, max_new=150)
        if spoil == "id":
            gateway.open({1: endless(150)[1]})
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await gateway.read(1)
        await until(lambda: not sum(pipeline.load for pipeline in router.fleet.pipelines))
    assert raised.value.code() is code and text in raised.value.details()


async def test_bytes_that_are_no_message_end_their_stream_and_no_other():
    async with router_of() as (router, gateway_to):
        gateway = gateway_to()
        async with grpc.aio.insecure_channel(router.address) as channel:
            call = channel.stream_stream("/dflash_ray.v1.Router/Generate")(iter([b"\xff\xff\xff"]))
            with pytest.raises(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
        prompt = endless(20)[0]
        gateway.open({1: prompt})
        await gateway.read(1)
    assert gateway.tokens[1] == answer(prompt, 20)
