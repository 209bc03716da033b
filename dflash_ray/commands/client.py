"""The client commands, over the public gRPC and HTTP APIs.

They go straight to the server that is named, whatever http_proxy says: prompts are not encrypted on the way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import httpx

from dflash_ray.commands.terminal import console, fail, new_table
from dflash_ray.pb import generation_pb2, generation_pb2_grpc, router_pb2
from dflash_ray.rpc.channel import DIRECT

_POLICIES = {
    "adaptive": router_pb2.SPECULATION_POLICY_ADAPTIVE,
    "fixed": router_pb2.SPECULATION_POLICY_FIXED,
    "off": router_pb2.SPECULATION_POLICY_OFF,
}


@dataclass
class Answer:
    """One streamed answer.

    Attributes:
        seconds: from the first token to the last.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    stats: generation_pb2.SpeculativeDecodingMetrics = field(default_factory=generation_pb2.SpeculativeDecodingMetrics)

    @property
    def tokens_per_second(self) -> float:
        return (len(self.token_ids) - 1) / self.seconds if self.seconds else 0.0


def stream_answer(
    address: str,
    messages: Sequence[tuple[str, str]],
    speculation: str,
    max_tokens: int | None,
    temperature: float,
    seed: int | None,
    show: bool = True,
) -> Answer:
    """Streams one answer to the terminal. Raises typer.Exit with a line that says what is wrong."""
    if speculation not in _POLICIES:
        fail(f"--speculation {speculation}: use one of {', '.join(_POLICIES)}")
    request = generation_pb2.GenerateRequest(
        temperature=temperature,
        sampling=generation_pb2.RandomSampling(seed=seed),
        stopping=generation_pb2.StoppingCriteria(max_new_tokens=max_tokens),
        response=generation_pb2.ResponseOptions(output_token_ids=True),
        speculation=router_pb2.Speculation(policy=_POLICIES[speculation]),
    )
    for role, content in messages:
        request.chat.messages.add(role=role, content=content)
    answer = Answer()
    first = 0.0
    try:
        with grpc.insecure_channel(address, options=DIRECT) as channel:
            for response in generation_pb2_grpc.GenerationStub(channel).GenerateStream(request):
                first = first or time.perf_counter()
                for output in response.outputs:
                    answer.token_ids.extend(output.token_ids)
                    answer.text += output.text
                    if show:
                        console.out(output.text, end="")
                if response.HasField("speculative_decoding"):
                    answer.stats.CopyFrom(response.speculative_decoding)
    except grpc.RpcError as error:
        fail(f"{address}: {error.code().name}: {error.details()}")
    answer.seconds = time.perf_counter() - first
    if show:
        console.out("")
    return answer


def run_generate(
    address: str, prompt: str, max_tokens: int, temperature: float, seed: int | None, speculation: str
) -> None:
    """`dflash-ray generate`."""
    answer = stream_answer(address, [("user", prompt)], speculation, max_tokens, temperature, seed)
    console.print(
        f"[dim]{len(answer.token_ids)} tokens, {answer.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {answer.stats.mean_acceptance_length:.2f}[/dim]"
    )


def run_chat(address: str, temperature: float, speculation: str) -> None:
    """`dflash-ray chat`."""
    messages: list[tuple[str, str]] = []
    while True:
        try:
            line = console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        messages.append(("user", line))
        answer = stream_answer(address, messages, speculation, None, temperature, None)
        messages.append(("assistant", answer.text))


def run_status(url: str) -> None:
    """`dflash-ray status`."""
    try:
        with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
            health = client.get("/health").status_code
            models = client.get("/v1/models").json()["data"]
            metrics = client.get("/metrics").text
    except httpx.HTTPError as error:
        fail(f"{url} does not answer ({error}); is `dflash-ray serve` running?")
    table = new_table("what", "value", has_header=False)
    table.add_row("health", "ready" if health == 200 else f"not ready ({health})")
    for model in models:
        table.add_row("model", f"{model['id']} (context {model['max_model_len']})")
    processes = sorted(
        {line.split('process="')[1].split('"')[0] for line in metrics.splitlines() if "process=" in line}
    )
    table.add_row("processes", "\n".join(processes))
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "generation_tokens_total"):
        table.add_row(name, f"{_total(metrics, f'vllm:{name}'):g}")
    drafts = _total(metrics, "vllm:spec_decode_num_drafts_total")
    accepted = _total(metrics, "vllm:spec_decode_num_accepted_tokens_total")
    table.add_row("mean acceptance length", f"{1 + accepted / drafts:.2f}" if drafts else "no drafts yet")
    console.print(table)


def _total(metrics: str, name: str) -> float:
    lines = (line for line in metrics.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
