"""What cannot be served is refused with the field's name, over HTTP and gRPC, and costs nobody else anything."""

import asyncio
import json

import grpc
import httpx
import pytest

from dflash_ray.pb import generation_pb2, generation_pb2_grpc
from tests.applications import PROMPTS, Client, request

HELLO = [{"role": "user", "content": "Hello"}]
BAD_BODIES = [
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
    ({}, 400, "messages"),
    ({"messages": HELLO, "model": "gpt-9"}, 404, "model"),
    ({"messages": HELLO, "temperature": -1}, 400, "temperature"),
    ({"messages": HELLO, "temperature": "hot"}, 400, "temperature"),
    ({"messages": HELLO, "top_p": 0}, 400, "top_p"),
    ({"messages": HELLO, "top_p": 1.5}, 400, "top_p"),
    ({"messages": HELLO, "min_p": 2}, 400, "min_p"),
    ({"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": HELLO, "max_tokens": -5}, 400, "max_tokens"),
    ({"messages": HELLO, "n": 1000}, 400, "n"),
    ({"messages": HELLO, "stop": ["a"] * 100}, 400, "stop"),
    ({"messages": HELLO, "stop": [""]}, 400, "stop"),
    ({"messages": HELLO, "logit_bias": {"999999": 1}}, 400, "logit_bias"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 99}, 400, "top_logprobs"),
    ({"messages": HELLO, "speculation": {"policy": "always"}}, 400, "speculation.policy"),
    ({"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools"),
    ({"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "messages"),
]


@pytest.mark.parametrize(("body", "status", "field"), BAD_BODIES, ids=lambda value: str(value)[:40])
async def test_a_bad_http_body_is_refused_with_the_fields_name(smollm2_app, body, status, field):
    async with httpx.AsyncClient(base_url=smollm2_app.http_url) as http:
        response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert field in error["message"] or field in str(error["param"])
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"messages": [', 400),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
        (b"[]", 400),
        (json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode(), 413),
    ],
    ids=["broken JSON", "invalid UTF-8", "NaN", "not an object", "10 MB"],
)
async def test_a_broken_http_body_is_refused(smollm2_app, content, status):
    async with httpx.AsyncClient(base_url=smollm2_app.http_url, timeout=30) as http:
        response = await http.post("/v1/chat/completions", content=content)
    assert response.status_code == status and response.json()["error"]["message"]


def bad_messages():
    def message(**changes):
        one = request("Hello")
        for name, value in changes.items():
            target, _, leaf = name.rpartition("__")
            setattr(getattr(one, target) if target else one, leaf, value)
        return one

    no_prompt = request("Hello")
    no_prompt.ClearField("chat")
    bad_token = request([99_999_999])
    long_prompt = request([5] * 9000)
    wizard = request("Hello")
    wizard.chat.messages[0].role = "wizard"
    stops = request("Hello")
    stops.stopping.stop_strings.extend(["a"] * 100)
    return [
        (no_prompt, "prompt"),
        (bad_token, "token_ids"),
        (long_prompt, "token_ids"),
        (wizard, "role"),
        (stops, "stop"),
        (message(temperature=float("nan")), "temperature"),
        (message(sampling__top_p=7.0), "top_p"),
        (message(sampling__num_sequences=1000), "n"),
        (message(stopping__max_new_tokens=0), "max_new_tokens"),
        (message(speculation__draft_tokens=500), "draft_tokens"),
    ]


@pytest.mark.parametrize(
    ("message", "field"), bad_messages(), ids=lambda value: value if isinstance(value, str) else ""
)
async def test_a_bad_grpc_request_is_an_invalid_argument_with_the_fields_name(smollm2_app, message, field):
    async with Client(smollm2_app.grpc_address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.generate(message)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in raised.value.details()


async def test_bytes_that_are_no_message_do_not_reach_the_model(smollm2_app):
    async with grpc.aio.insecure_channel(smollm2_app.grpc_address) as channel:
        call = channel.unary_unary("/dflash_ray.v1.Generation/Generate")
        with pytest.raises(grpc.aio.AioRpcError):
            await call(b"\xff\xff\xff\xff")
        info = await generation_pb2_grpc.GenerationStub(channel).ModelInfo(generation_pb2.ModelInfoRequest())
    assert info.model == smollm2_app.config.model.served_name


async def test_neighbours_of_bad_requests_get_their_own_tokens(smollm2_app):
    prompts = [prompt["prompt"] for prompt in PROMPTS[:6]]
    async with Client(smollm2_app.grpc_address) as client, httpx.AsyncClient(base_url=smollm2_app.http_url) as http:
        alone = [(await client.generate(request(prompt))).token_ids for prompt in prompts]

        async def disturb(body):
            return (await http.post("/v1/chat/completions", json=body, timeout=60)).status_code

        disturbed = await asyncio.gather(
            *(client.generate(request(prompt)) for prompt in prompts), *(disturb(body) for body, _, _ in BAD_BODIES)
        )
    assert [output.token_ids for output in disturbed[: len(prompts)]] == alone


async def test_a_client_that_leaves_frees_its_sequence(smollm2_app):
    async with httpx.AsyncClient(base_url=smollm2_app.http_url, timeout=60) as http:
        body = {"messages": HELLO, "max_tokens": 2000, "stream": True, "ignore_eos": True}
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            await anext(response.aiter_lines())
        async with asyncio.timeout(20):
            while "vllm:num_requests_running" not in (text := (await http.get("/metrics")).text) or any(
                line.startswith("vllm:num_requests_running{") and not line.endswith(" 0.0")
                for line in text.splitlines()
            ):
                await asyncio.sleep(0.3)
