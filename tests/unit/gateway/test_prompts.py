"""Requests of both APIs become the same prompt."""

import pytest
from google.protobuf.json_format import ParseDict

from dflash_ray.config import DflashRayConfig, parse_config
from dflash_ray.gateway.openai_types import ChatCompletionRequest
from dflash_ray.gateway.requests import RequestBuilder
from dflash_ray.gateway.tokenizer import ChatTokenizer
from dflash_ray.pb import generation_pb2
from tests.tiny_tokenizers import save_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DflashRayConfig:
    directory = save_tokenizer(tmp_path_factory.mktemp("model"))
    return parse_config({"model": {"path": str(directory), "max_model_len": 128}})


@pytest.fixture(scope="module")
def builder(config) -> RequestBuilder:
    return RequestBuilder(config, ChatTokenizer(config.model))


def from_http(builder, **fields):
    body = ChatCompletionRequest.model_validate({"messages": MESSAGES, **fields})
    return builder.from_chat(body, "r")


def from_grpc(builder, **chat):
    return builder.from_grpc(ParseDict({"chat": {"messages": MESSAGES, **chat}}, generation_pb2.GenerateRequest()), "r")


@pytest.mark.parametrize("make", [from_http, from_grpc])
def test_chat_template_variables_of_a_request_reach_the_template(builder, make):
    assert make(builder).prompt_ids != make(builder, chat_template_kwargs={"enable_thinking": False}).prompt_ids
    assert make(builder).prompt_ids == make(builder, chat_template_kwargs={"enable_thinking": True}).prompt_ids


def test_whole_numbers_among_grpc_template_variables_are_integers(tmp_path):
    directory = save_tokenizer(tmp_path, template="{{ n }} {{ x.y[0] }}")
    config = parse_config({"model": {"path": str(directory), "max_model_len": 128}})
    tokenizer = ChatTokenizer(config.model)
    request = from_grpc(RequestBuilder(config, tokenizer), chat_template_kwargs={"n": 3, "x": {"y": [0.5]}})
    assert tokenizer.decode(request.prompt_ids) == "3 0.5"
