"""Routers and toy target groups that talk over real gRPC, in one process and without Ray.

What runs here is the real thing from the gateway's calls to the router's streams; the model is a toy.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from types import TracebackType

import grpc

from dflash_ray.config import DflashRayConfig, NetworkConfig, load_config
from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.gateway.mailbox import Mailbox
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.resumption import ResumedCall
from dflash_ray.gateway.routers import Routers
from dflash_ray.gateway.token_chunks import TokenChunk
from dflash_ray.observability.metrics import RouterMetrics
from dflash_ray.pb import (
    common_pb2,
    drafter_pb2,
    drafter_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
)
from dflash_ray.router.fleet import Fleet
from dflash_ray.router.servicer import RouterServicer
from dflash_ray.rpc.channel import RunningServer, new_server, start_server
from dflash_ray.rpc.directory import Entry, keep_registered
from dflash_ray.rpc.target_service import add_target_service
from tests.directories import LocalDirectory
from tests.toy import ToyTarget

_ids = itertools.count()
NETWORK = NetworkConfig()
TTL_S = 3.0  # of leases and entries: longer than this process is ever held up


def config_of(*overrides: str) -> DflashRayConfig:
    ttls = (f"router.lease_ttl_s={TTL_S}", f"network.entry_ttl_s={TTL_S}")
    return load_config(None, ["drafter.method=ngram", *ttls, *overrides])


class _Process:
    """A server and its entry."""

    kind: str

    def __init__(self, directory: LocalDirectory) -> None:
        self.id = f"{self.kind}{next(_ids)}"
        self._directory = directory
        self._tasks: list[asyncio.Task] = []
        self._server: RunningServer

    def _add_to(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    def _info(self) -> dict:
        return {}

    async def start(self) -> None:
        server = new_server(NETWORK.max_message_bytes)
        self._add_to(server)
        self._server = await start_server(server, [], "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.port}"
        registration = keep_registered(self._directory, self._entry, TTL_S)
        self._tasks.append(asyncio.create_task(registration))

    def _entry(self) -> Entry:
        return Entry(self.kind, self.id, self.address, self._info())

    async def kill(self) -> None:
        """Ends as SIGKILL would: the entry is left to expire."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.server.stop(None)


class ToyGroup(_Process, target_pb2_grpc.TargetServicer):
    """A target group of one toy.

    Attributes:
        poison: the group ends when it is to run a sequence that begins with this token.
        opened: the tokens of every sequence that it was sent.
    """

    kind = "target"

    def __init__(self, directory: LocalDirectory, model: str = "toy", step_s: float = 0.01, is_silent=False) -> None:
        super().__init__(directory)
        self.model, self.step_s, self.is_silent = model, step_s, is_silent
        self.epoch = 0
        self.poison: int | None = None
        self.is_dead = False
        self.opened: list[list[int]] = []

    def _add_to(self, server: grpc.aio.Server) -> None:
        add_target_service(self, server)

    async def Verify(self, request_iterator, context):
        epoch = 0
        async for request in request_iterator:
            kind = request.WhichOneof("message")
            if self.is_silent:
                await asyncio.Event().wait()
            if kind == "hello":
                if request.hello.epoch <= self.epoch:
                    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "take a new lease")
                self.epoch = epoch = request.hello.epoch
                target = ToyTarget(num_pages=400)
                yield target_pb2.TargetResponse(hello=self._hello(target))
            elif epoch < self.epoch:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another router leads this group")
            elif kind == "step":
                await asyncio.sleep(self.step_s)
                self.opened.extend(list(message.token_ids) for message in request.step.open)
                if any(message.token_ids[0] == self.poison for message in request.step.open):
                    await self._directory.unregister("target", self.id)
                    self._tasks[0].cancel()
                    self.is_silent = self.is_dead = True
                    await context.abort(grpc.StatusCode.INTERNAL, "the rank died")
                yield target_pb2.TargetResponse(result=target.step(request.step))
            elif kind == "close":
                target.close(request.close.sequence_ids)

    def _hello(self, target: ToyTarget) -> target_pb2.TargetHelloReply:
        limits = target.limits
        return target_pb2.TargetHelloReply(
            protocol_version=PROTOCOL_VERSION,
            target_id=self.id,
            model_fingerprint=self.model,
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            page_size=limits.page_size,
            num_pages=limits.num_pages,
            max_batch_tokens=limits.max_batch_tokens,
        )


class ToyDrafter(_Process, drafter_pb2_grpc.DrafterServicer):
    """Counts the hellos that it gets and answers none of them, or says that it needs features of its own kind."""

    kind = "drafter"

    def __init__(self, directory: LocalDirectory, is_silent: bool) -> None:
        super().__init__(directory)
        self.is_silent = is_silent
        self.num_hellos = 0

    def _add_to(self, server: grpc.aio.Server) -> None:
        drafter_pb2_grpc.add_DrafterServicer_to_server(self, server)

    async def Draft(self, request_iterator, context):
        async for _ in request_iterator:
            self.num_hellos += 1
            if self.is_silent:
                await asyncio.Event().wait()
            yield drafter_pb2.DrafterResponse(
                hello=drafter_pb2.DrafterHelloReply(
                    protocol_version=PROTOCOL_VERSION, fingerprint="other", needs_features=True
                )
            )


class ToyRouter(_Process):
    """A router's parts as its replica puts them together."""

    kind = "router"

    def __init__(self, directory: LocalDirectory, config: DflashRayConfig) -> None:
        super().__init__(directory)
        self.fleet = Fleet(config, self.id, directory, RouterMetrics())

    def _add_to(self, server: grpc.aio.Server) -> None:
        self.servicer = RouterServicer(self.fleet)
        router_pb2_grpc.add_RouterServicer_to_server(self.servicer, server)

    def _info(self) -> dict:
        return self.fleet.info()

    async def start(self) -> None:
        await super().start()
        self._tasks.append(asyncio.create_task(self.fleet.run()))

    async def kill(self) -> None:
        await super().kill()
        await self.fleet._attempts.close()
        for pipeline in self.fleet.pipelines:
            await pipeline.close()

    async def stop(self) -> None:
        """Ends as the replica does when Serve stops it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._directory.unregister("router", self.id)
        await self.fleet.close()
        self.servicer.close()
        await self._server.stop(1.0)


class Cluster:
    """Processes around one directory, and a gateway's calls to the routers."""

    def __init__(self, *overrides: str) -> None:
        self.config = config_of(*overrides)
        self.directory = LocalDirectory()
        self.routers = Routers(self.directory, self.config.network)
        self.num_resumed = 0
        self._processes: list[_Process] = []

    async def __aenter__(self) -> Cluster:
        self._poll = asyncio.create_task(self.routers.run())
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._poll.cancel()
        await self.routers.close()
        for process in self._processes:
            await process.kill()

    async def group(self, **options) -> ToyGroup:
        return await self._started(ToyGroup(self.directory, **options))

    async def drafter(self, **options) -> ToyDrafter:
        return await self._started(ToyDrafter(self.directory, **options))

    async def router(self, directory: LocalDirectory | None = None) -> ToyRouter:
        return await self._started(ToyRouter(directory or self.directory, self.config))

    async def _started(self, process):
        await process.start()
        self._processes.append(process)
        return process

    async def led(self, *num_groups: int) -> None:
        """Returns when the gateway is told that its routers lead that many groups, in any order."""

        def told() -> list[int]:
            infos = [entry.info for entry in self.routers._known.entries]
            return sorted(info["num_groups"] if info["ready"] else 0 for info in infos)

        await until(lambda: told() == sorted(num_groups))

    async def generate(
        self, prompt: list[int], max_new_tokens: int = 40, wait_s: float = 60.0, tokens: list[int] | None = None
    ) -> list[int]:
        """The answer's tokens; `tokens` is filled as they come."""
        tokens = [] if tokens is None else tokens
        request = GenerationRequest(
            request_id="test",
            prompt_ids=prompt,
            sampling=common_pb2.SamplingParams(top_p=1, repetition_penalty=1),
            stopping=common_pb2.StoppingParams(max_new_tokens=max_new_tokens),
            speculation=router_pb2.Speculation(policy=router_pb2.SPECULATION_POLICY_OFF),
        )
        deadline = time.monotonic() + 100

        def count() -> None:
            self.num_resumed += 1

        mailbox: Mailbox[TokenChunk] = Mailbox()
        call = ResumedCall(self.routers, request, lambda chunk: chunk, mailbox.put, deadline, wait_s, count)
        call.start()
        try:
            is_finished = False
            while not is_finished:
                for chunk in await mailbox.take():
                    tokens.extend(chunk.token_ids)
                    is_finished = bool(chunk.finish_reason)
        finally:
            call.close()
        return tokens


async def until(condition, timeout_s: float = 60.0) -> None:
    """Returns when `condition()` is true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)
