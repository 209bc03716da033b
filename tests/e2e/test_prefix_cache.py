"""A chat's second turn finds what its first has computed: the same text, and the usage says how much was found."""

from __future__ import annotations

import asyncio

import grpc
import httpx

from dflash_ray.pb import generation_pb2_grpc
from dflash_ray.rpc.channel import DIRECT
from tests.applications import PROMPTS, Application, request

LONG = "\n".join(prompt["prompt"] for prompt in PROMPTS[:12])


async def chat(app: Application, messages: list[dict[str, str]], salt: str, **options) -> dict:
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, "cache_salt": salt, **options}
    async with httpx.AsyncClient(timeout=120) as http:
        response = await http.post(f"{app.http_url}/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: dict) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def cached(answer: dict) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


async def test_a_second_turn_says_the_same_with_its_history_found_as_computed_anew(smollm2_app):
    for policy in ("off", "fixed"):
        options = {"speculation": {"policy": policy}, "seed": 3, "temperature": 0.7}
        messages = [{"role": "user", "content": f"{policy}: {LONG}"}]
        first = await chat(smollm2_app, messages, policy, **options)
        assert cached(first) == 0
        messages.append({"role": "assistant", "content": texts(first)[0]})
        messages.append({"role": "user", "content": "Go on."})
        found = await chat(smollm2_app, messages, policy, **options)
        computed = await chat(smollm2_app, messages, f"{policy}, and another one", **options)
        assert cached(found) >= first["usage"]["prompt_tokens"] - 16 and cached(computed) == 0
        assert texts(found) == texts(computed)
        assert found["metrics"] == computed["metrics"]


async def test_choices_share_their_prompt_and_say_what_they_say_alone(smollm2_app):
    messages = [{"role": "user", "content": f"Choices: {LONG}"}]
    together = await chat(smollm2_app, messages, "n", n=4, temperature=1.0, seed=5)
    alone = [await chat(smollm2_app, messages, f"n{i}", temperature=1.0, seed=5 + i) for i in range(4)]
    assert texts(together) == [texts(answer)[0] for answer in alone]
    assert cached(together) == 0, "one of them has computed it"
    async with httpx.AsyncClient() as http:
        metrics = (await http.get(f"{smollm2_app.http_url}/metrics")).text
    hits = [line for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    assert sum(float(line.split()[-1]) for line in hits) >= 3 * (together["usage"]["prompt_tokens"] - 17)


async def test_grpc_requests_find_rows_as_well_under_their_salt(smollm2_app):
    message = request(f"gRPC: {LONG}")
    async with grpc.aio.insecure_channel(smollm2_app.grpc_address, options=DIRECT) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        answers = []
        for salt in ("a", "a", "b"):
            message.cache_salt = salt
            answers.append(await asyncio.wait_for(stub.Generate(message), 120))
    assert [answer.num_cached_tokens > 100 for answer in answers] == [False, True, False]
    assert len({answer.outputs[0].text for answer in answers}) == 1
