"""CPU that a router and a gateway spend on one step's tokens, between the router's scheduler and the clients' sockets.

    python benchmarks/gateway_stream.py --sequences 1 32 256 --tokens 4

The router's process runs the production servicer over a pipeline that emits a fixed number of tokens for every sequence
each step; the gateway's runs the production streams, resumption, text and metrics, and with --events the server-sent
events as well, which it throws away. Printed is process CPU time a step, start and end of requests left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time

from dflash_ray.config import ModelConfig, NetworkConfig
from dflash_ray.core.garbage import leave_out_what_stands
from dflash_ray.core.stats import DecodePass
from dflash_ray.gateway.answers import _events
from dflash_ray.gateway.generation import Generator
from dflash_ray.gateway.openai_responses import ResponseWriter
from dflash_ray.gateway.openai_types import ChatCompletionRequest
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.routers import Routers
from dflash_ray.observability.metrics import GatewayMetrics
from dflash_ray.pb import common_pb2, router_pb2, router_pb2_grpc
from dflash_ray.router.actions import Emit
from dflash_ray.router.servicer import RouterServicer
from dflash_ray.rpc.channel import new_server, start_server
from dflash_ray.rpc.directory import DirectoryClient, Entry
from dflash_ray.text.tokenizer import ChatTokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests. "
SETTLED = 5  # steps before and after those that are counted
LIMIT = NetworkConfig().max_message_bytes


class EmittingPipeline:
    """A pipeline whose target commits `num_tokens` tokens of every sequence each step, once all requests are there."""

    model_fingerprint = "model"

    def __init__(self, args: argparse.Namespace, token_ids: list[int]) -> None:
        self._args = args
        self._token_ids = token_ids
        self._listeners = []
        self.done = asyncio.get_running_loop().create_future()

    async def pick(self, fingerprint: str) -> EmittingPipeline:
        """A fleet of this pipeline alone."""
        return self

    def start(self, request, listener):
        self._listeners.append(listener)
        if len(self._listeners) == self._args.sequences[0]:
            self._running = asyncio.create_task(self._run())
        return request

    def cancel(self, sequence) -> None:
        pass

    async def _run(self) -> None:
        await asyncio.sleep(0.5)
        leave_out_what_stands()
        count, steps = self._args.tokens, self._args.steps
        decode_pass = DecodePass(count - 1, count - 1, count - 1)
        for step in range(steps + 2 * SETTLED):
            if step == SETTLED:
                started = time.process_time()
            if step == steps + SETTLED:
                used = time.process_time() - started
            at = step * count % (len(self._token_ids) - count)
            is_last = step == steps + 2 * SETTLED - 1
            reason = common_pb2.FINISH_REASON_LENGTH if is_last else common_pb2.FINISH_REASON_UNSPECIFIED
            for listener in self._listeners:
                listener.emit(Emit(None, self._token_ids[at : at + count], None, reason, decode_pass))
            await asyncio.sleep(self._args.period_ms / 1000)
        self.done.set_result(1000 * used / steps)


async def serve(args: argparse.Namespace) -> None:
    """The router's process: prints its port, and in the end its milliseconds a step."""
    pipeline = EmittingPipeline(args, [])
    server = new_server(LIMIT)
    router_pb2_grpc.add_RouterServicer_to_server(RouterServicer(pipeline), server)
    running = await start_server(server, [], "127.0.0.1", 0)
    print(running.port, flush=True)
    pipeline._token_ids = json.loads(await asyncio.to_thread(sys.stdin.readline))
    print(await pipeline.done, flush=True)
    await running.stop()


async def measure(args: argparse.Namespace, tokenizer: ChatTokenizer, num_sequences: int) -> tuple[float, float]:
    """Milliseconds of a step in the router and in the gateway."""
    command = [sys.executable, __file__, "--serve", "--sequences", str(num_sequences)]
    for name in ("tokens", "steps", "period_ms"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    router = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    port = await asyncio.to_thread(router.stdout.readline)
    router.stdin.write(json.dumps(tokenizer.encode(TEXT * 50)) + "\n")
    router.stdin.flush()
    routers = Routers(DirectoryClient(), NetworkConfig())
    routers.update([Entry("router", "r", f"127.0.0.1:{int(port)}", {"ready": True})])
    generator = Generator(routers, tokenizer, GatewayMetrics(), "model", 600, 60)
    times: list[float] = []
    await asyncio.gather(*(answer(args, tokenizer, generator, times if i == 0 else []) for i in range(num_sequences)))
    used = times[-1 - SETTLED] - times[SETTLED]
    steps = len(times) - 1 - 2 * SETTLED
    await routers.close()
    router_ms = float(await asyncio.to_thread(router.stdout.readline))
    router.wait()
    return router_ms, 1000 * used / steps


async def answer(args: argparse.Namespace, tokenizer: ChatTokenizer, generator: Generator, times: list[float]) -> None:
    """One client's request; `times` gets the process's CPU time with every delta."""
    request = GenerationRequest(
        request_id="r",
        prompt_ids=[1] * 20,
        sampling=common_pb2.SamplingParams(top_p=1, repetition_penalty=1),
        stopping=common_pb2.StoppingParams(max_new_tokens=100_000),
        speculation=router_pb2.Speculation(),
        stop_strings=args.stop,
    )
    batches = generator.generate(request, silence_s=15.0)
    if args.events:
        body = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], stream=True)
        writer = ResponseWriter("chat", "r", "model", tokenizer, body, [request])
        events = _events(writer, [], batches)
        async for _ in events:
            times.append(time.process_time())
        return
    async for deltas in batches:
        if deltas and deltas[0].token_ids:
            times.append(time.process_time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--tokens", type=int, default=4, help="of a sequence and step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--period-ms", type=float, default=40)
    parser.add_argument("--stop", nargs="*", default=[], help="stop strings that never come")
    parser.add_argument("--events", action="store_true", help="write server-sent events")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args))
        return
    tokenizer = ChatTokenizer(ModelConfig())
    leave_out_what_stands()  # as the replica does
    print("sequences  router ms/step  gateway ms/step")
    for num_sequences in args.sequences:
        router_ms, gateway_ms = asyncio.run(measure(args, tokenizer, num_sequences))
        print(f"{num_sequences:9} {router_ms:15.3f} {gateway_ms:16.3f}", flush=True)


if __name__ == "__main__":
    main()
