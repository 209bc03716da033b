"""The gRPC API takes the options of the HTTP API under the names of its own messages, with the same checks."""

import asyncio

import grpc
import pytest

from dflash_ray.core.errors import OverloadedError
from dflash_ray.gateway.token_chunks import TokenChunk
from dflash_ray.pb import common_pb2, generation_pb2, generation_pb2_grpc, router_pb2
from tests.applications import request
from tests.gateways import gateway, says

WORDS = "One two three four five six seven eight."


def changed(**values) -> generation_pb2.GenerateRequest:
    """A good request with fields set by path, a__b for a.b."""
    message = request("Hello", temperature=1.0)
    for path, value in values.items():
        owner = message
        *sections, name = path.split("__")
        for section in sections:
            owner = getattr(owner, section)
        if isinstance(value, list):
            getattr(owner, name).extend(value)
        elif isinstance(value, dict):
            getattr(owner, name).update(value)
        else:
            setattr(owner, name, value)
    return message


async def refused(app, message) -> grpc.aio.AioRpcError:
    async with grpc.aio.insecure_channel(app.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await generation_pb2_grpc.GenerationStub(channel).Generate(message)
    return raised.value


async def test_what_http_refuses_grpc_refuses_under_its_own_names():
    bad = {
        "temperature": float("inf"),
        "sampling__top_k": 2**32 - 1,
        "sampling__top_p": 0.0,
        "sampling__min_p": 2.0,
        "sampling__num_sequences": 2**32 - 1,
        "sampling__verify_mode": 9,
        "decoding__presence_penalty": -3.0,
        "decoding__repetition_penalty": 0.0,
        "decoding__logit_bias": {5: 1000.0},
        "stopping__max_new_tokens": 0,
        "stopping__min_new_tokens": 2**32 - 1,
        "stopping__stop_strings": [""],
        "stopping__stop_token_ids": [2**32 - 1],
        "speculation__draft_tokens": 32,
        "speculation__policy": 9,
        "cache_salt": "x" * 257,
        "response__output_logprobs": 1000,
    }
    async with gateway(says("ok")) as app:
        for path, value in bad.items():
            error = await refused(app, changed(**{path: value}))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert error.details().startswith(path.replace("__", ".")), error.details()
        assert not app.router.requests


async def test_options_reach_the_router_as_over_http():
    message = changed(
        sampling__top_k=5, sampling__top_p=0.5, sampling__min_p=0.25, sampling__seed=2**64 - 1,
        decoding__presence_penalty=0.5, decoding__frequency_penalty=-0.5, decoding__repetition_penalty=1.5,
        decoding__logit_bias={5: 1.0}, stopping__max_new_tokens=7, stopping__min_new_tokens=2,
        stopping__stop_token_ids=[9], speculation__draft_tokens=3,
        sampling__verify_mode=common_pb2.VERIFY_MODE_REJECTION,
        speculation__policy=router_pb2.SPECULATION_POLICY_ADAPTIVE, response__output_logprobs=2, cache_salt="one",
    )  # fmt: skip
    body = {
        "messages": [{"role": "user", "content": "Hello"}], "top_k": 5, "top_p": 0.5, "min_p": 0.25, "seed": 2**64 - 1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5, "logit_bias": {"5": 1.0},
        "max_tokens": 7, "min_tokens": 2, "stop_token_ids": [9], "verify_mode": "rejection", "logprobs": True,
        "top_logprobs": 2, "speculation": {"policy": "adaptive", "draft_tokens": 3}, "cache_salt": "one",
    }  # fmt: skip
    async with gateway(says("ok")) as app, grpc.aio.insecure_channel(app.grpc_address) as channel:
        await generation_pb2_grpc.GenerationStub(channel).Generate(message)
        assert (await app.http.post("/v1/chat/completions", json=body)).status_code == 200
        over_grpc, over_http = app.router.requests
    over_grpc.request_id = over_http.request_id
    assert over_grpc == over_http


async def test_an_absent_option_has_its_default():
    message = generation_pb2.GenerateRequest()
    message.chat.messages.add(role="user", content="Hello")
    async with gateway(says("ok")) as app, grpc.aio.insecure_channel(app.grpc_address) as channel:
        await generation_pb2_grpc.GenerationStub(channel).Generate(message)
        (asked,) = app.router.requests
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.repetition_penalty) == (1.0, 1.0, 1.0)
    assert asked.stopping.max_new_tokens == app.parts.config.model.max_model_len - asked.prompt_len


async def test_a_stop_string_inside_accepted_drafts_ends_everything_with_its_last_token():
    answers = []
    for pass_size in (1, 6):
        async with gateway(says(WORDS, pass_size)) as app, grpc.aio.insecure_channel(app.grpc_address) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            message = changed(stopping__stop_strings=[" four"])
            whole = await stub.Generate(message)
            parts = [part async for part in stub.GenerateStream(message)]
            expected = app.parts.tokenizer.encode("One two three four")
        (output,) = whole.outputs
        assert output.text == "One two three" and output.finish_info.stop_string == " four"
        assert output.token_ids == expected and output.finish_info.num_output_tokens == len(expected)
        assert [token for part in parts for token in part.outputs[0].token_ids] == expected
        assert whole.speculative_decoding == parts[-1].speculative_decoding
        assert whole.speculative_decoding.num_spec_steps > 0
        answers.append(output)
    assert answers[0] == answers[1]


async def test_a_stream_says_when_a_router_has_taken_it():
    may_answer = asyncio.Event()

    async def respond(asked):
        yield TokenChunk()
        await may_answer.wait()
        async for part in says(WORDS)(asked):
            yield part

    async with gateway(respond) as app, grpc.aio.insecure_channel(app.grpc_address) as channel:
        call = generation_pb2_grpc.GenerationStub(channel).GenerateStream(request("Hello"))
        async with asyncio.timeout(10):
            await call.initial_metadata()
        may_answer.set()
        assert all([part.outputs[0].num_tokens async for part in call])


async def test_errors_have_the_status_that_http_has_and_faults_tell_nothing(monkeypatch):
    async def respond(asked):
        raise OverloadedError("full")
        yield

    async with gateway(respond) as app:
        assert (await refused(app, request("Hello"))).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    async with gateway(says(WORDS)) as app:
        monkeypatch.setattr(app.parts.tokenizer, "decode", None)
        error = await refused(app, request("Hello"))
    assert error.code() == grpc.StatusCode.INTERNAL and "NoneType" not in error.details()


async def test_text_that_is_no_utf8_is_an_invalid_argument():
    async with gateway(says("ok")) as app, grpc.aio.insecure_channel(app.grpc_address) as channel:
        for method in ("Generate", "Tokenize"):
            call = channel.unary_unary(f"/dflash_ray.v1.Generation/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(b"\x12\x03\xed\xa0\x80")  # model: "\ud800"
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
