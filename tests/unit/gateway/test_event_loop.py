"""Large requests are read, rendered and tokenized beside the event loop: others are served meanwhile."""

import asyncio
import contextlib
import json
import threading

import grpc
import pytest
from pydantic import ValidationError

from dflash_ray.gateway.openai_types import ChatCompletionRequest, CompletionRequest, DetokenizeBody
from dflash_ray.pb import generation_pb2, generation_pb2_grpc
from dflash_ray.text.tokenizer import ChatTokenizer
from tests.gateways import gateway, says

LINE = "The quick brown fox jumps over the lazy dog. 12345 é日本 <b>x</b>\n"
LONG = LINE * 7000  # about as much as is not refused by its size alone
HUGE = LINE * 40000
MANY = list(range(1000)) * 600


@contextlib.asynccontextmanager
async def turns():
    """A list whose length is the number of turns of the event loop so far."""
    seen: list[None] = []

    async def count() -> None:
        while True:
            seen.append(None)
            await asyncio.sleep(0.001)  # so that a turn or two between two calls into native code do not count

    counting = asyncio.create_task(count())
    try:
        yield seen
    finally:
        counting.cancel()


@contextlib.contextmanager
def counted(monkeypatch, name, seen):
    """Turns that the loop took during each call of a method of the tokenizer."""
    during: list[int] = []
    method = getattr(ChatTokenizer, name)

    def call(self, *args, **kwargs):
        before = len(seen)
        try:
            return method(self, *args, **kwargs)
        finally:
            during.append(len(seen) - before)

    with monkeypatch.context() as patch:
        patch.setattr(ChatTokenizer, name, call)
        yield during


def post(path, **body):
    async def send(app):
        response = await app.http.post(path, content=json.dumps(body, ensure_ascii=False).encode())
        return response.status_code

    return send


def call(method, request):
    async def send(app):
        async with grpc.aio.insecure_channel(app.grpc_address) as channel:
            try:
                await getattr(generation_pb2_grpc.GenerationStub(channel), method)(request)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

    return send


CHAT = [{"role": "user", "content": LONG}]
CASES = [
    (post("/v1/chat/completions", messages=CHAT), "encode_chat", 400),
    (post("/v1/completions", prompt=LONG), "encode", 400),
    (post("/tokenize", prompt=LONG), "encode", 200),
    (post("/tokenize", messages=CHAT), "encode_chat", 200),
    (post("/detokenize", tokens=MANY), "decode", 200),
    (call("Generate", generation_pb2.GenerateRequest(text=LONG)), "encode", grpc.StatusCode.INVALID_ARGUMENT),
    (call("Tokenize", generation_pb2.TokenizeRequest(text=LONG)), "encode", grpc.StatusCode.OK),
    (call("Detokenize", generation_pb2.DetokenizeRequest(token_ids=MANY)), "decode", grpc.StatusCode.OK),
]


@pytest.mark.parametrize(("send", "method", "status"), CASES)
async def test_the_event_loop_turns_while_a_long_text_is_made_tokens_or_text(monkeypatch, send, method, status):
    async with gateway(says("ok")) as app, turns() as seen:
        with counted(monkeypatch, method, seen) as during:
            assert await send(app) == status
    assert len(during) == 1 and during[0] > 10


async def test_streams_and_health_are_served_while_a_large_prompt_is_made_tokens(monkeypatch):
    is_served = threading.Event()
    encode_chat = ChatTokenizer.encode_chat

    def held(self, messages, *args):
        if messages[0]["content"] == HUGE:
            assert is_served.wait(30), "nothing else was served meanwhile"
        return encode_chat(self, messages, *args)

    monkeypatch.setattr(ChatTokenizer, "encode_chat", held)
    async with gateway(says("word " * 50)) as app:
        refused = asyncio.create_task(post("/v1/chat/completions", messages=[{"role": "user", "content": HUGE}])(app))
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        async with app.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = [line async for line in stream.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert (await app.http.get("/health")).status_code == 200
        is_served.set()
        assert await refused == 400


BODIES = {
    "a list of numbers": {"prompt": MANY},
    "numbers that are no tokens": {"prompt": [0.5] * 500_000},
    "many prompts": {"prompt": ["a"] * 500_000},
    "one long prompt of many": {"prompt": [[1], MANY]},
    "many messages": {"messages": [{"role": "user", "content": "a"}] * 60_000},
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_more_entries_than_can_be_served_are_refused_before_each_is_checked(monkeypatch, body):
    async with gateway(says("ok")) as app:
        monkeypatch.setattr("dflash_ray.gateway.http_api.check", lambda *_: pytest.fail("checked in full"))
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        response = await app.http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(body))


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (CompletionRequest, {"prompt": [0.5] * 1000}),
        (CompletionRequest, {"prompt": [[0.5] * 1000]}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 1000}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [-1] * 1000}),
        (ChatCompletionRequest, {"messages": [1] * 1000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [1] * 1000}]}),
        (DetokenizeBody, {"tokens": ["a"] * 1000}),
    ],
)
def test_a_list_is_checked_up_to_its_first_fault(model, values):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    assert caught.value.error_count() < 6
