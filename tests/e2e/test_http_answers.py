"""What the served model's answers hold over HTTP: where they end, and how likely their prompts and tokens are."""

import httpx
import pytest
import torch

from tests.applications import PROMPTS
from tests.reference import Reference

COMPLETIONS = "/v1/completions"


@pytest.fixture
async def http(smollm2_app):
    async with httpx.AsyncClient(base_url=smollm2_app.http_url, timeout=120) as client:
        yield client


async def test_a_stop_string_ends_tokens_usage_and_statistics_alike_with_speculation_on_and_off(http):
    prompt = PROMPTS[16]["prompt"]
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 48, "logprobs": True,
            "return_token_ids": True}  # fmt: skip
    whole = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
    text = whole["message"]["content"]
    num_drafted = 0
    # Stop strings that end all over the text: some within accepted drafts.
    for at in range(12, len(text) - 4, 9):
        stop = text[at : at + 4]
        answers = []
        for policy in ("off", "fixed"):
            asked = {**body, "stop": stop, "min_tokens": 3, "speculation": {"policy": policy}}
            answer = (await http.post("/v1/chat/completions", json=asked)).json()
            stats = answer["metrics"]["speculative_decoding"]
            choice, usage = answer["choices"][0], answer["usage"]
            num_tokens = len(choice["token_ids"])
            assert choice["finish_reason"] == "stop" and choice["stop_reason"] == stop
            assert usage["completion_tokens"] == num_tokens == len(choice["logprobs"]["content"])
            assert choice["token_ids"] == whole["token_ids"][:num_tokens]
            assert stats["num_spec_steps"] + stats["num_accepted_draft_tokens"] in (num_tokens - 1, num_tokens)
            num_drafted += stats["num_draft_tokens"]
            answers.append((choice["token_ids"], choice["message"], usage["total_tokens"]))
        assert answers[0] == answers[1]
    assert num_drafted


async def test_an_echoed_prompts_log_probabilities_are_those_of_transformers(http, reference: Reference):
    prompts = [reference.chat_ids(prompt["prompt"]) for prompt in PROMPTS[:3]]
    prompts.append((prompts[0] * 40)[:700])  # prefilled in several chunks, beside the others
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = (await http.post(COMPLETIONS, json=body)).json()
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        values = choice["logprobs"]["token_logprobs"]
        with torch.inference_mode():
            logits = reference.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert values[0] is None and len(values) == len(ids) + 1
        torch.testing.assert_close(torch.tensor(values[1:-1]), expected, atol=2e-3, rtol=1e-3)
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]]
        torch.testing.assert_close(torch.tensor(best), logits.amax(-1), atol=2e-3, rtol=1e-3)


async def test_headers_of_a_stream_leave_the_server_before_its_tokens(http):
    body = {"messages": [{"role": "user", "content": PROMPTS[0]["prompt"]}], "stream": True, "max_tokens": 200}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_load_balancers_ask_with_head(http, path):
    response = await http.head(path)
    assert response.status_code == 200 and not response.content
