"""The HTTP API as clients meet it: what is accepted, what is refused and how, and what a stream looks like."""

import asyncio
import json
import logging

import openai
import pytest

from dflash_ray.core.errors import OverloadedError, RequestError, UnavailableError
from dflash_ray.gateway.token_chunks import TokenChunk
from dflash_ray.pb import common_pb2
from tests.gateways import chunk, gateway, says

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
STOP = common_pb2.FINISH_REASON_STOP
WORDS = "One two three four five six seven eight."
# An answer's message as the openai package gives it back, and what other clients put into theirs.
HISTORY = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
    {"role": "user", "content": "Hello", "name": "ann", "type": "text"},
    {"role": "assistant", "content": "Hi!", "refusal": None, "annotations": [], "audio": None, "function_call": None,
     "tool_calls": None, "reasoning_content": "They greet me."},
    {"role": "assistant", "content": None, "refusal": "No.", "tool_calls": []},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "input_text", "text": "now?"}]},
]  # fmt: skip
NULLS = (
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n",
    "stream", "stream_options", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "ignore_eos", "min_tokens", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens",
    "return_token_ids", "speculation", "verify_mode", "logprobs", "top_logprobs", "response_format", "tools",
    "tool_choice", "functions", "function_call", "modalities", "audio", "prediction", "best_of", "echo", "suffix",
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier",
    "reasoning_effort", "verbosity", "web_search_options", "guided_json", "structured_outputs", "chat_template",
)  # fmt: skip


async def post(body: dict, path: str = CHAT, *overrides: str, respond=None):
    async with gateway(respond or says("ok"), *overrides) as app:
        return await app.http.post(path, json=body), app.router.requests


async def events(app, body: dict, path: str = CHAT) -> list:
    """Data and comments of a stream, JSON parsed."""
    async with app.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        return [_parsed(line) async for line in response.aiter_lines() if line]


def _parsed(line: str):
    data = line.removeprefix("data: ")
    return json.loads(data) if data.startswith("{") else data


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_null_means_not_given_for_every_optional_field(path):
    required = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    async with gateway(says("ok")) as app:
        response = await app.http.post(path, json=required | dict.fromkeys(NULLS))
        assert response.status_code == 200, response.text
        plain = await app.http.post(path, json=required)
        assert plain.status_code == 200
        with_nulls, without = app.router.requests
    with_nulls.sampling.seed = without.sampling.seed
    with_nulls.request_id = without.request_id
    assert with_nulls == without


async def test_fields_that_say_nothing_about_the_text_are_accepted():
    body = {
        "messages": HELLO, "prompt_cache_key": "k", "safety_identifier": "s", "reasoning_effort": "low", "best_of": 1,
        "verbosity": "low", "tools": [], "tool_choice": "none", "functions": None, "modalities": ["text"],
        "response_format": {"type": "text"}, "user": "u", "metadata": {"a": "b"}, "store": False, "brand_new": {"x": 1},
        "stream_options": {"include_obfuscation": False}, "prediction": {"type": "content", "content": "x"},
    }  # fmt: skip
    response, _ = await post(body)
    assert response.status_code == 200, response.text


async def test_an_unknown_field_is_logged_once_and_a_known_one_never(caplog):
    caplog.set_level(logging.INFO, "dflash_ray.gateway")
    async with gateway(says("ok")) as app:
        for _ in range(3):
            body = {"messages": HELLO, "brand_new": 1, "user": "u"}
            assert (await app.http.post(CHAT, json=body)).status_code == 200
        await app.http.post(CHAT, json={"messages": HELLO} | {f"field{i}": i for i in range(500)})
    lines = [record.getMessage() for record in caplog.records if "not used here" in record.getMessage()]
    assert sum("'brand_new'" in line for line in lines) == 1
    assert not any("'user'" in line for line in lines) and len(lines) <= 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]), ("tool_choice", "required"),
        ("functions", [{"name": "f"}]), ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}), ("guided_json", {"type": "object"}),
        ("structured_outputs", {"regex": "a"}), ("best_of", 3), ("logits_processors", ["x"]), ("bad_words", ["x"]),
        ("allowed_token_ids", [1]), ("use_beam_search", True), ("modalities", ["text", "audio"]),
        ("audio", {"voice": "a"}), ("web_search_options", {}), ("suffix", "end"), ("skip_special_tokens", False),
        ("continue_final_message", True), ("truncate_prompt_tokens", 5), ("documents", [{"text": "x"}]),
    ],
)  # fmt: skip
async def test_what_would_change_the_answer_is_refused_by_name(field, value):
    response, requests = await post({"messages": HELLO, field: value})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, field, "unsupported_parameter")
    assert error["message"].startswith(f"{field}: ") and not requests


async def test_an_answers_own_message_comes_back_as_history():
    async with gateway(says("ok")) as app:
        assert (await app.http.post(CHAT, json={"messages": HISTORY})).status_code == 200
        plain = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi!"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "And now?"},
        ]
        assert app.router.requests[0].token_ids == app.parts.tokenizer.encode_chat(plain)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages.0"),
        ({"role": "user", "content": None}, "messages.0"),
        ({"role": "tool", "content": "x"}, "messages.0.role"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "messages.0.tool_calls"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content.0.type"),
    ],
)
async def test_a_message_that_cannot_be_read_is_refused_by_name(message, param):
    response, _ = await post({"messages": [message]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("prompt", [5, {}, [1.5], [1, "a"], ["a", 1], [[1], ["a"]], [[[1]]]], ids=str)
async def test_what_is_no_prompt_is_refused_in_words_that_a_client_knows(prompt):
    response, _ = await post({"prompt": prompt}, COMPLETIONS)
    assert response.json()["error"]["message"] == "prompt: must be text, token ids, or a list of either"


async def test_messages_of_errors_are_free_of_our_classes():
    for body in ({"stream_options": 5}, {"stop": [""]}, {"speculation": 5}, {"messages": 5}, {"messages": ["x"]}):
        response, _ = await post({"messages": HELLO} | body)
        message = response.json()["error"]["message"]
        assert response.status_code == 400 and "Value error" not in message and "instance" not in message


async def test_completions_take_max_completion_tokens():
    response, requests = await post({"prompt": "x", "max_completion_tokens": 3}, COMPLETIONS, respond=says(WORDS))
    assert response.json()["usage"]["completion_tokens"] == 3 == requests[0].stopping.max_new_tokens


HUGE = 10**30
BAD_VALUES = [
    *[(name, HUGE) for name in ("max_tokens", "min_tokens", "top_k", "seed", "n", "top_logprobs", "temperature")],
    *[(name, -HUGE) for name in ("max_tokens", "top_k", "seed", "presence_penalty")],
    ("top_k", 2**31), ("stop_token_ids", [HUGE]), ("logit_bias", {str(HUGE): 1}), ("logit_bias", {"5": HUGE}),
    ("stop", "a\ud800"), ("user", "\udfff"), ("messages", [{"role": "user", "content": "\ud83d"}]),
    ("model", "\ud800"), ("metadata", {"\ud800": 1}), ("logit_bias", {"x": 1}), ("speculation", {"draft_tokens": HUGE}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_VALUES, ids=lambda value: repr(value)[:30])
async def test_numbers_out_of_range_and_halves_of_characters_are_refused_by_name(field, value):
    async with gateway(says("ok")) as app:
        body = json.dumps({"messages": HELLO, "logprobs": True, field: value})
        response, requests = await app.http.post(CHAT, content=body), app.router.requests
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"].split(".")[0] == field and not requests


@pytest.mark.parametrize("field", ["max_tokens", "seed", "top_k", "temperature", "n", "stop_token_ids", "prompt"])
async def test_an_integer_of_5000_digits_is_refused_by_name(field):
    digits = "9" * 5000
    text = f"[{digits}]" if field in ("stop_token_ids", "prompt") else digits
    body = f'{{"prompt": "x", "{field}": {text}}}'
    async with gateway(says("ok")) as app:
        response = await app.http.post(COMPLETIONS, content=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"].split(".")[0] == field and len(response.text) < 500


async def test_errors_have_codes_that_are_strings():
    async with gateway(says("ok"), "model.aliases=[gpt-4o]") as app:
        long = [{"role": "user", "content": "word " * 9000}]
        for method, path, body, status, code in [
            ("POST", CHAT, {"messages": long}, 400, "context_length_exceeded"),
            ("POST", CHAT, {"messages": HELLO, "model": "gpt-9"}, 404, "model_not_found"),
            ("GET", "/v1/models/gpt-9", None, 404, "model_not_found"),
            ("POST", CHAT, {"messages": HELLO, "top_p": 7}, 400, "invalid_value"),
            ("POST", CHAT, {}, 400, "missing_required_parameter"),
            ("GET", "/v1/nothing", None, 404, "not_found"),
            ("GET", CHAT, None, 405, "method_not_allowed"),
        ]:
            response = await app.http.request(method, path, json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_a_fault_of_ours_is_an_error_object_too(monkeypatch):
    async with gateway(says(WORDS)) as app:
        monkeypatch.setattr(app.parts.tokenizer, "decode", None)
        response = await app.http.post(CHAT, json={"messages": HELLO})
        assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        lines = await events(app, {"messages": HELLO})
    assert lines[-1]["error"]["code"] == "internal_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"), [(OverloadedError("full"), 429, "1"), (UnavailableError("away"), 503, "5")]
)
async def test_a_refusal_by_the_router_has_its_status_and_says_when_to_come_back(stream, error, status, retry_after):
    async def respond(request):
        raise error
        yield

    async with gateway(respond) as app:
        if status == 503:
            app.parts.routers.update([])
        response = await app.http.post(CHAT, json={"messages": HELLO, "stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (status, retry_after)
    assert isinstance(response.json()["error"]["code"], str)


async def test_a_streams_headers_leave_when_the_router_has_taken_it_and_comments_follow_until_tokens_come():
    may_answer = asyncio.Event()

    async def respond(request):
        yield TokenChunk()
        await may_answer.wait()
        async for part in says(WORDS)(request):
            yield part

    async with gateway(respond, "gateway.keepalive_s=0.05") as app:
        body = {"messages": HELLO, "stream": True}
        async with app.http.stream("POST", CHAT, json=body) as response:
            assert response.status_code == 200
            assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
            lines = response.aiter_lines()
            comments = [await anext(lines) for _ in range(4)]
            assert [line for line in comments if line] == [": keep-alive"] * 2
            may_answer.set()
            rest = [line async for line in lines if line.startswith("data")]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[0][6:])["choices"][0]["delta"]["role"] == "assistant"


async def test_nothing_follows_an_error_event():
    async def respond(request):
        yield TokenChunk()
        yield chunk(504)
        raise RequestError("no more")

    async with gateway(respond) as app:
        lines = await events(app, {"messages": HELLO})
    assert lines[-1]["error"]["code"] == "internal_error" and "[DONE]" not in lines


async def test_a_stop_string_inside_accepted_drafts_ends_usage_tokens_and_statistics_alike_with_and_without_them():
    answers = []
    for pass_size in (1, 6):
        async with gateway(says(WORDS, pass_size)) as app:
            body = {
                "messages": HELLO, "stop": " four", "return_token_ids": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }  # fmt: skip
            whole = (await app.http.post(CHAT, json=body)).json()
            lines = [line for line in await events(app, body) if isinstance(line, dict)]
            expected = app.parts.tokenizer.encode("One two three four")
        choice = whole["choices"][0]
        assert choice["message"]["content"] == "One two three" and choice["token_ids"] == expected
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " four")
        assert whole["usage"]["completion_tokens"] == len(expected) == lines[-1]["usage"]["completion_tokens"]
        deltas = [line["choices"][0] for line in lines if line["choices"]]
        assert "".join(delta["delta"]["content"] for delta in deltas) == "One two three"
        # The last tokens have no text: it is held back for the stop string, and they are not.
        assert [token for delta in deltas for token in delta.get("token_ids", [])] == expected
        assert [line["usage"]["completion_tokens"] for line in lines][-1] == len(expected)
        stats = whole["metrics"]["speculative_decoding"]
        assert stats == lines[-1]["metrics"]["speculative_decoding"]
        assert stats["num_spec_steps"] >= 1
        assert stats["num_spec_steps"] + stats["num_accepted_draft_tokens"] in (len(expected) - 1, len(expected))
        answers.append((choice, whole["usage"]))
    assert answers[0] == answers[1]


async def test_usage_comes_with_every_chunk_only_where_it_is_asked_for():
    async with gateway(says(WORDS)) as app:
        num_tokens = len(app.parts.tokenizer.encode(WORDS))
        for options, expected in [
            ({}, []),
            ({"include_usage": True}, [None] * (num_tokens + 1) + [num_tokens]),
            (
                {"include_usage": True, "continuous_usage_stats": True},
                [1, *range(1, num_tokens + 1), num_tokens],  # the role comes in a chunk of its own
            ),
        ]:
            lines = await events(app, {"messages": HELLO, "stream_options": options})
            seen = [line["usage"] and line["usage"]["completion_tokens"] for line in lines[:-1] if "usage" in line]
            assert lines[-1] == "[DONE]" and seen == expected


async def test_log_probabilities_of_a_streamed_completion_say_where_their_text_stands():
    async def respond(request):
        async for part in says(WORDS, 3)(request):
            count = len(part.token_ids)
            part.logprobs = common_pb2.TokenLogprobs(
                chosen=[-0.5] * count, num_top=1, top_token_ids=[5] * count, top_logprobs=[float("-inf")] * count
            )
            yield part

    async with gateway(respond) as app:
        body = {"prompt": "x", "logprobs": 1, "max_tokens": 7}
        whole = (await app.http.post(COMPLETIONS, json=body)).json()["choices"][0]
        parts = [line["choices"][0]["logprobs"] for line in (await events(app, body, COMPLETIONS))[:-1]]
    assert [at for part in parts for at in part["text_offset"]] == whole["logprobs"]["text_offset"]
    for text, at in zip(whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"], strict=True):
        assert whole["text"][at:].startswith(text)
    # The chosen token is always among the likeliest, and minus infinity is a number that JSON has.
    assert all(len(top) == 2 and -9999.0 in top.values() for top in whole["logprobs"]["top_logprobs"])


async def test_the_prompts_of_a_list_run_together_but_not_more_than_allowed():
    async def respond(request):
        yield TokenChunk()
        await asyncio.sleep(0.05)
        yield chunk(request.token_ids[0], reason=STOP)

    async with gateway(respond, "gateway.parallel_prompts=3", "gateway.max_prompts=8") as app:
        body = {"prompt": [[5], [6], [7], [8], [9], [10]], "n": 1, "return_token_ids": True}
        answer = (await app.http.post(COMPLETIONS, json=body)).json()
        assert app.router.most_running == 3
        assert [choice["token_ids"] for choice in answer["choices"]] == [[5], [6], [7], [8], [9], [10]]
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert answer["usage"]["prompt_tokens"] == 6
        lines = [line for line in await events(app, body, COMPLETIONS) if isinstance(line, dict)]
        assert {line["choices"][0]["index"] for line in lines} == set(range(6))
        refused = await app.http.post(COMPLETIONS, json={"prompt": ["x"] * 9})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


async def test_one_refused_prompt_of_a_list_ends_the_others():
    async def respond(request):
        if request.token_ids[0] == 6:
            raise OverloadedError("full")
        yield TokenChunk()
        await asyncio.sleep(30)

    async with gateway(respond) as app:
        response = await app.http.post(COMPLETIONS, json={"prompt": [[5], [6], [7]]})
        assert response.status_code == 429
        async with asyncio.timeout(5):
            while app.router.num_running:
                await asyncio.sleep(0.01)


async def test_a_client_that_leaves_a_waiting_stream_frees_its_request():
    async def respond(request):
        yield TokenChunk()
        await asyncio.sleep(30)

    async with gateway(respond, "gateway.keepalive_s=0.05") as app:
        async with app.http.stream("POST", CHAT, json={"messages": HELLO, "stream": True}) as response:
            await anext(response.aiter_lines())
        async with asyncio.timeout(5):
            while app.router.num_running:
                await asyncio.sleep(0.01)


async def test_a_model_answers_to_all_its_names_and_gives_the_first():
    async with gateway(says("ok"), "model.aliases=[gpt-4o, default]") as app:
        names = [model["id"] for model in (await app.http.get("/v1/models")).json()["data"]]
        assert names == [app.parts.config.model.served_name, "gpt-4o", "default"]
        for name in names:
            assert (await app.http.get(f"/v1/models/{name}")).json()["id"] == name
            answer = await app.http.post(CHAT, json={"messages": HELLO, "model": name})
            assert answer.json()["model"] == names[0]


async def test_health_and_models_answer_head():
    async with gateway(says("ok")) as app:
        for path in ("/health", "/v1/models", f"/v1/models/{app.parts.config.model.served_name}"):
            response = await app.http.head(path)
            assert response.status_code == 200 and not response.content


async def test_pages_of_other_origins_may_call_only_where_the_configuration_says_so():
    origin = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST"}
    async with gateway(says("ok")) as app:
        response = await app.http.post(CHAT, json={"messages": HELLO}, headers=origin)
        assert response.status_code == 200 and "access-control-allow-origin" not in response.headers
    async with gateway(says("ok"), "gateway.cors.allow_origins=[https://chat.example.org]") as app:
        asked = await app.http.options(CHAT, headers=origin | {"Access-Control-Request-Headers": "content-type"})
        assert asked.status_code == 200
        for response in (asked, await app.http.post(CHAT, json={}, headers=origin)):
            assert response.headers["access-control-allow-origin"] == origin["Origin"]
        other = await app.http.post(CHAT, json={"messages": HELLO}, headers={"Origin": "https://else.example.org"})
        assert "access-control-allow-origin" not in other.headers


def scored(start: int, values: list[float]) -> TokenChunk:
    """Log-probabilities of the prompt's tokens from `start` on."""
    part = common_pb2.TokenLogprobs(
        chosen=values, num_top=1, top_token_ids=[5] * len(values), top_logprobs=[-0.25] * len(values)
    )
    return TokenChunk(prompt_logprobs=common_pb2.PromptLogprobs(start=start, logprobs=part))


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
async def test_an_echoed_prompt_comes_with_its_own_log_probabilities(max_tokens):
    async def respond(request):
        assert request.sampling.num_prompt_logprobs == 1
        yield TokenChunk()
        yield scored(1, [-1.0, -2.0])
        yield scored(1, [-1.0, -2.0, -3.0])  # the prompt was prefilled again
        async for part in says(WORDS)(request):
            part.logprobs = common_pb2.TokenLogprobs(chosen=[-0.5] * len(part.token_ids))
            yield part

    async with gateway(respond) as app:
        prompt = app.parts.tokenizer.encode("Zero one two three")
        body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        whole = (await app.http.post(COMPLETIONS, json=body)).json()
        lines = [line["choices"][0] for line in (await events(app, body, COMPLETIONS))[:-1]]
        answer = app.parts.tokenizer.encode(WORDS)[:max_tokens]
        choice = whole["choices"][0]
        assert choice["text"] == "Zero one two three" + app.parts.tokenizer.decode(answer)
        assert choice["finish_reason"] == "length" and whole["usage"]["completion_tokens"] == max_tokens
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -3.0, *[-0.5] * max_tokens]
        assert logprobs["tokens"] == [app.parts.tokenizer.token_text(token) for token in [*prompt, *answer]]
        assert logprobs["top_logprobs"][0] is None and -0.25 in logprobs["top_logprobs"][1].values()
        assert [choice["text"][at:][:1] for at in logprobs["text_offset"]] == [t[:1] for t in logprobs["tokens"]]
    assert "".join(line["text"] for line in lines) == choice["text"]
    for name in logprobs:
        assert [value for line in lines for value in (line["logprobs"] or {name: []})[name]] == logprobs[name]


async def test_echo_without_log_probabilities_is_the_prompt_and_the_answer():
    async with gateway(says(" five.")) as app:
        body = {"prompt": ["One", "Two"], "echo": True, "max_tokens": 20}
        texts = [choice["text"] for choice in (await app.http.post(COMPLETIONS, json=body)).json()["choices"]]
        assert texts == ["One five.", "Two five."]
        assert not app.router.requests[0].sampling.HasField("num_prompt_logprobs")
        refused = await app.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


async def test_the_openai_package_reads_over_comments_and_raises_what_a_stream_ends_with():
    async def respond(request):
        yield TokenChunk()
        await asyncio.sleep(0.15)
        async for part in says(WORDS)(request):
            yield part

    async with gateway(respond, "gateway.keepalive_s=0.05") as app:
        client = openai.AsyncOpenAI(base_url=f"{app.http_url}/v1", api_key="none", max_retries=0)
        async with client:
            stream = await client.chat.completions.create(model="", messages=HELLO, stream=True)
            assert "".join([part.choices[0].delta.content async for part in stream]) == WORDS
            with pytest.raises(openai.NotFoundError) as raised:
                await client.chat.completions.create(model="gpt-9", messages=HELLO, stream=True)
            assert raised.value.code == "model_not_found"

    async def breaks(request):
        yield TokenChunk()
        yield chunk(504)
        raise RequestError("broken")

    async with gateway(breaks) as app, openai.AsyncOpenAI(base_url=f"{app.http_url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model="", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="broken"):
            _ = [part async for part in stream]


def found(counts: dict[int, int]):
    """A router whose target found so many tokens of each choice's prompt, by the choice's seed."""

    async def respond(request):
        yield TokenChunk()
        yield TokenChunk([5], num_cached_tokens=counts[request.sampling.seed])
        yield TokenChunk([6], STOP, num_cached_tokens=900)  # found when it came back from a preemption

    return respond


@pytest.mark.parametrize(
    ("counts", "n", "cached"), [({0: 0}, 1, 0), ({0: 3}, 1, 3), ({0: 700}, 1, 8), ({0: 0, 1: 6, 2: 6}, 3, 0)]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_usage_says_how_much_of_a_prompt_was_found_computed_for_all_of_its_choices(counts, n, cached, stream):
    body = {"prompt": [9] * 8, "n": n, "seed": 0}
    async with gateway(found(counts)) as app:
        if stream:
            usage = (await events(app, {**body, "stream_options": {"include_usage": True}}, COMPLETIONS))[-2]["usage"]
        else:
            usage = (await app.http.post(COMPLETIONS, json=body)).json()["usage"]
    assert usage["prompt_tokens"] == 8 and usage["prompt_tokens_details"] == {"cached_tokens": cached}


async def test_a_salt_goes_on_as_a_hash_which_differs_where_the_salts_do(caplog):
    caplog.set_level(logging.DEBUG)
    async with gateway(says("ok")) as app:
        for salt in ("secret-salt", "secret-salt", "another", "", None):
            await app.http.post(COMPLETIONS, json={"prompt": "x", "cache_salt": salt})
        refused = await app.http.post(COMPLETIONS, json={"prompt": "x", "cache_salt": "secret-salt" * 30})
        first, again, other, empty, absent = (request.cache_salt for request in app.router.requests)
    assert first == again != other and empty == absent == b"" and len(first) == 32
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "cache_salt"
    assert "secret-salt" not in caplog.text + refused.text
