"""Requests of both APIs become the same prompt."""

import json

import pytest
from google.protobuf.json_format import ParseDict
from transformers import AutoTokenizer

from dflash_ray.config import DflashRayConfig, parse_config
from dflash_ray.core.errors import InvalidRequestError
from dflash_ray.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from dflash_ray.gateway.requests import RequestBuilder
from dflash_ray.pb import generation_pb2
from dflash_ray.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizers import LLAMA3, save_tokenizer

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


def completion(builder, prompt="hi", **fields):
    (request,) = builder.from_completion(CompletionRequest.model_validate({"prompt": prompt, **fields}), "r")
    return request


def text(builder, prompt="hi", **fields):
    return builder.from_grpc(ParseDict({"text": prompt, **fields}, generation_pb2.GenerateRequest()), "r")


@pytest.mark.parametrize("make", [completion, text])
@pytest.mark.parametrize("prompt", ["hi", " the user", "<think>", ""])
def test_a_plain_prompt_begins_as_the_post_processor_says(config, builder, make, prompt):
    reference = AutoTokenizer.from_pretrained(config.model.path)
    assert make(builder, prompt).prompt_ids == reference(prompt)["input_ids"]
    assert make(builder, prompt).prompt_ids[0] == reference.bos_token_id


def test_bos_in_a_prompt_stays_text_behind_the_real_one(config, builder):
    reference = AutoTokenizer.from_pretrained(config.model.path)
    ids = completion(builder, "<s>hi").prompt_ids
    assert ids.count(reference.bos_token_id) == 1 and reference.decode(ids[1:]) == "<s>hi"
    assert reference.bos_token_id not in completion(builder, "<s>hi", add_special_tokens=False).prompt_ids


def test_a_chat_gets_no_second_bos(tmp_path):
    directory = save_tokenizer(tmp_path, template=LLAMA3)
    config = parse_config({"model": {"path": str(directory), "max_model_len": 256}})
    tokenizer = ChatTokenizer(config.model)
    bos = AutoTokenizer.from_pretrained(directory).bos_token_id
    assert from_http(RequestBuilder(config, tokenizer)).prompt_ids.count(bos) == 1


def model_with(directory, **files):
    save_tokenizer(directory)
    for name, values in files.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return {"path": str(directory), "max_model_len": 128}


def builder_of(model):
    config = parse_config({"model": model})
    return RequestBuilder(config, ChatTokenizer(config.model))


def test_all_files_together_say_which_tokens_stop(tmp_path):
    model = model_with(
        tmp_path,
        generation_config={"eos_token_id": [5, 7]},
        config={"eos_token_id": 6, "text_config": {"eos_token_id": [7, 8]}},
    )
    request = completion(builder_of(model), stop_token_ids=[3])
    end = AutoTokenizer.from_pretrained(tmp_path).eos_token_id
    assert list(request.stopping.stop_token_ids) == [3, 5, 6, 7, 8, end]
    assert request.eos_ids == (5, 6, 7, 8, end)
    assert list(completion(builder_of(model), ignore_eos=True).stopping.stop_token_ids) == []


GENERATION = {"temperature": 0.5, "top_p": 0.75, "top_k": 20, "min_p": 0.25, "repetition_penalty": 1.5}


def sampling_of(request):
    return {name: getattr(request.sampling, name) for name in GENERATION}


@pytest.mark.parametrize("make", [completion, from_http, text, from_grpc])
def test_the_models_sampling_defaults_apply(tmp_path, make):
    model = model_with(tmp_path, generation_config={**GENERATION, "max_length": 20, "do_sample": True})
    assert sampling_of(make(builder_of(model))) == GENERATION
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert sampling_of(make(builder_of({**model, "use_generation_config": False}))) == neutral


def test_what_a_request_says_comes_before_the_models_defaults(tmp_path):
    builder = builder_of(model_with(tmp_path, generation_config=GENERATION))
    wanted = {"temperature": 0.0, "top_p": 0.5, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert sampling_of(completion(builder, **wanted)) == wanted
    assert completion(builder, top_k=-1).sampling.top_k == 0
    grpc = text(
        builder,
        temperature=0.0,
        sampling={"top_p": 0.5, "top_k": 0, "min_p": 0.0},
        decoding={"repetition_penalty": 1.0},
    )
    assert sampling_of(grpc) == wanted


def test_sampling_defaults_that_no_request_may_have_are_refused_at_start(tmp_path):
    model = model_with(tmp_path, generation_config={"temperature": -1})
    with pytest.raises(ValueError, match=r"generation_config\.json: temperature is -1"):
        builder_of(model)
    builder_of({**model, "use_generation_config": False})


def test_the_models_context_limits_prompts_and_answers(tmp_path):
    model = model_with(tmp_path, config={"max_position_embeddings": 16})
    assert builder_of(model).max_model_len == 16
    assert completion(builder_of(model), "a b", max_tokens=100).stopping.max_new_tokens == 16 - 4
    with pytest.raises(InvalidRequestError, match="maximum context length is 16"):
        completion(builder_of(model), "a" * 16)
    yarn = {"rope_type": "yarn", "factor": 4.0}
    model_with(tmp_path, config={"max_position_embeddings": 16, "rope_scaling": yarn})
    assert builder_of(model).max_model_len == 64


def test_tokens_that_the_model_lacks_are_refused_though_the_tokenizer_has_them(tmp_path):
    builder = builder_of(model_with(tmp_path, config={"vocab_size": 200}))
    with pytest.raises(InvalidRequestError, match="below 200"):
        completion(builder, [1, 200])
    with pytest.raises(InvalidRequestError, match="below 200"):
        completion(builder, [1], logit_bias={"200": 1})
