"""Two of everything: each kind of process is killed under 16 streams, and nothing is lost and no token different."""

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import grpc
import httpx
import pytest
import ray

from dflash_ray.pb import generation_pb2, generation_pb2_grpc
from dflash_ray.rpc.directory import ACTOR_NAME, NAMESPACE, DirectoryClient, Entry, Kind
from tests.applications import PROMPTS, Application, application, request
from tests.metrics import total

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KINDS: tuple[Kind, ...] = ("gateway", "router", "target", "drafter")
NUM_STREAMS = 16
MAX_NEW_TOKENS = 40
TOKENS_BEFORE_THE_KILL = 4 * NUM_STREAMS
HEALING_S = 240.0
SETUP = (
    *(f"{kind}.num_replicas=2" for kind in KINDS),
    *(f"{kind}.num_threads=1" for kind in ("target", "drafter")),
    "gateway.grpc_port=0",
    "target.kv_cache_tokens=8192",
)


@dataclass
class Load:
    """Sixteen streams, half of them greedy and half drawn with seeds, over both gateways."""

    gateways: list[Entry]
    victim: Entry | None = None  # the process that is killed
    tokens: list[list[int]] = field(default_factory=lambda: [[] for _ in range(NUM_STREAMS)])
    num_reconnected: int = 0

    async def run(self, disturb: Callable[[], Awaitable[None]] | None = None) -> list[list[int]]:
        """The tokens of every stream. `disturb` is called when they are under way."""
        streams = [asyncio.create_task(self._stream(i)) for i in range(NUM_STREAMS)]
        if disturb is not None:
            while sum(len(tokens) for tokens in self.tokens) < TOKENS_BEFORE_THE_KILL:
                await asyncio.sleep(0.05)
            assert not any(stream.done() for stream in streams)
            await disturb()
        await asyncio.gather(*streams)
        return self.tokens

    async def _stream(self, i: int) -> None:
        options = {"temperature": 0.8, "seed": 1000 + i} if i % 2 else {}
        message = request(PROMPTS[i]["prompt"], max_new_tokens=MAX_NEW_TOKENS, **options)
        for gateway in (self.gateways[i // 2 % 2], self.gateways[1 - i // 2 % 2]):
            try:
                await self._receive(i, gateway, message)
                return
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or gateway != self.victim:
                    raise
            # A gateway's own clients lose their connections with it, and ask the other one from the start.
            self.num_reconnected += 1
            self.tokens[i] = []

    async def _receive(self, i: int, gateway: Entry, message: generation_pb2.GenerateRequest) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.info['grpc_port']}") as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            async for response in stub.GenerateStream(message, timeout=300):
                for output in response.outputs:
                    self.tokens[i].extend(output.token_ids)


class Processes:
    """The application's processes, found through its directory."""

    def __init__(self) -> None:
        self._directory = DirectoryClient()

    async def entries(self, kind: Kind) -> list[Entry]:
        return await self._directory.entries(kind)

    async def healed(self, without: str = "") -> dict[Kind, list[Entry]]:
        """Two of every kind, all groups led; `without` is the id of the one that was killed."""
        async with asyncio.timeout(HEALING_S):
            while True:
                await asyncio.sleep(0.5)
                try:
                    found = {kind: await self.entries(kind) for kind in KINDS}
                except ConnectionError:
                    continue
                ids = [entry.id for entries in found.values() for entry in entries]
                is_led = sum(router.info["num_groups"] for router in found["router"]) == 2
                if is_led and without not in ids and all(len(entries) == 2 for entries in found.values()):
                    return found


@pytest.fixture(scope="module")
def app() -> Iterator[Application]:
    with application(*SETUP) as app:
        yield app


@pytest.fixture(scope="module")
def undisturbed(app: Application) -> list[list[int]]:
    async def run() -> list[list[int]]:
        return await Load((await Processes().healed())["gateway"]).run()

    return asyncio.run(run())


async def metrics(app: Application) -> str:
    """The page of one of the gateways, whichever Serve's proxy chooses."""
    async with asyncio.timeout(HEALING_S), httpx.AsyncClient(timeout=30) as http:
        while True:
            try:
                response = await http.get(f"{app.http_url}/metrics")
                if response.status_code == 200:
                    return response.text
            except httpx.TransportError:
                pass  # the proxy has not noticed yet that a gateway is gone
            await asyncio.sleep(0.5)


async def num_resumed(app: Application) -> float:
    return total(await metrics(app), "dflash_ray_gateway_resumed_calls_total")


def pid_of(entry: Entry) -> int:
    return entry.info["pids"][0] if entry.kind == "target" else entry.info["pid"]


def victim_of(kind: Kind, found: dict[Kind, list[Entry]]) -> Entry:
    """One that has work: a router that leads a group."""
    return next(entry for entry in found[kind] if kind != "router" or entry.info["num_groups"])


async def test_every_gateway_shows_the_same_sums_over_all_processes(app, undisturbed):
    found = await Processes().healed()
    names = {f"{entry.kind}-{entry.id}" for entries in found.values() for entry in entries}
    before = total(await metrics(app), "vllm:generation_tokens_total")
    num_tokens = sum(len(tokens) for tokens in await Load(found["gateway"]).run())
    for page in [await metrics(app) for _ in range(8)]:
        assert total(page, "vllm:generation_tokens_total") == before + num_tokens
        assert set(re.findall(r'process="([^"]+)"', page)) == names


@pytest.mark.parametrize("kind", ["drafter", "router", "target", "gateway"])
async def test_a_killed_process_loses_no_request_and_changes_no_token(kind, app, undisturbed):
    processes = Processes()
    found = await processes.healed()
    victim = victim_of(kind, found)
    before = await num_resumed(app)

    async def kill() -> None:
        os.kill(pid_of(victim), signal.SIGKILL)

    load = Load(found["gateway"], victim)
    assert await load.run(kill) == undisturbed
    assert load.num_reconnected == (NUM_STREAMS / 2 if kind == "gateway" else 0)
    await processes.healed(without=victim.id)
    if kind in ("router", "target"):
        assert await num_resumed(app) > before, "the kill disturbed nothing"


async def test_a_killed_directory_fences_no_leader_and_disturbs_no_stream(app, undisturbed):
    processes = Processes()
    found = await processes.healed()
    before = await num_resumed(app)
    leads = {router.id: router.info["num_groups"] for router in found["router"]}
    actor = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
    pid = await actor.__ray_call__.remote(lambda _: os.getpid())

    async def kill() -> None:
        os.kill(pid, signal.SIGKILL)

    assert await Load(found["gateway"]).run(kill) == undisturbed
    after = await processes.healed()
    assert await ray.get_actor(ACTOR_NAME, namespace=NAMESPACE).__ray_call__.remote(lambda _: os.getpid()) != pid
    assert {router.id: router.info["num_groups"] for router in after["router"]} == leads
    assert await num_resumed(app) == before
