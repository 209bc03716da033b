"""The whole application under test, and a small client of its gRPC service."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from dflash_ray.config import DflashRayConfig, load_config
from dflash_ray.pb import common_pb2, generation_pb2, generation_pb2_grpc, router_pb2
from dflash_ray.rpc.channel import DIRECT

PROMPTS = [json.loads(line) for line in (Path(__file__).parent / "data/prompts.jsonl").read_text().splitlines()]
POLICIES = {
    "off": router_pb2.SPECULATION_POLICY_OFF,
    "fixed": router_pb2.SPECULATION_POLICY_FIXED,
    "adaptive": router_pb2.SPECULATION_POLICY_ADAPTIVE,
}


def free_port() -> int:
    """A port to listen on a minute later: outside what the system hands to others meanwhile (32768 and above) and what
    Ray gives its workers (10002 to 19999)."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("100 ports between 20000 and 32000 are taken")


@dataclass(frozen=True)
class Application:
    config: DflashRayConfig

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.config.gateway.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.config.gateway.grpc_port}"


@contextmanager
def application(*overrides: str) -> Iterator[Application]:
    """Runs the default configuration on free ports, with `key=value` overrides."""
    from dflash_ray.app import running_app

    ports = [f"gateway.http_port={free_port()}", f"gateway.grpc_port={free_port()}"]
    config = load_config(None, [*ports, "observability.log_level=WARNING", *overrides])
    with running_app(config):
        yield Application(config)


@dataclass(frozen=True)
class Output:
    token_ids: list[int]
    text: str
    finish_reason: int
    metrics: generation_pb2.SpeculativeDecodingMetrics


def request(
    prompt: str | Sequence[int],
    speculation: str = "fixed",
    max_new_tokens: int = 24,
    temperature: float = 0.0,
    seed: int = 0,
    draft_tokens: int = 4,
    **sampling: float,
) -> generation_pb2.GenerateRequest:
    """A request for a chat message (str) or raw token ids."""
    message = generation_pb2.GenerateRequest(
        temperature=temperature,
        sampling=generation_pb2.RandomSampling(seed=seed, **sampling),
        stopping=generation_pb2.StoppingCriteria(max_new_tokens=max_new_tokens),
        response=generation_pb2.ResponseOptions(output_token_ids=True),
        speculation=router_pb2.Speculation(policy=POLICIES[speculation], draft_tokens=draft_tokens),
    )
    if isinstance(prompt, str):
        message.chat.messages.add(role="user", content=prompt)
    else:
        message.token_ids.ids.extend(prompt)
    return message


class Client:
    """Generates over the streaming call, which is what clients use most."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=DIRECT)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *args: object) -> None:
        await self._channel.close()

    async def generate(self, message: generation_pb2.GenerateRequest, timeout_s: float = 240.0) -> Output:
        token_ids: list[int] = []
        text = ""
        last = generation_pb2.GenerateResponse()
        async for last in self._stub.GenerateStream(message, timeout=timeout_s):
            for output in last.outputs:
                token_ids.extend(output.token_ids)
                text += output.text
        finish = last.outputs[0].finish_info.finish_reason if last.outputs else common_pb2.FINISH_REASON_UNSPECIFIED
        return Output(token_ids, text, finish, last.speculative_decoding)
