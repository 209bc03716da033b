"""Sixteen clients at once, over HTTP and gRPC, each with parameters of its own: each gets its own right answer."""

import asyncio

from openai import AsyncOpenAI

from tests.applications import PROMPTS, Client, request

GRPC_OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_p": 0.9},
    {"temperature": 0.9, "seed": 3, "top_k": 20, "min_p": 0.05},
]
HTTP_OPTIONS = [
    {"temperature": 0.0, "max_tokens": 20},
    {"temperature": 0.8, "seed": 5, "max_tokens": 16, "presence_penalty": 0.5},
    {"temperature": 1.0, "seed": 6, "max_tokens": 24, "stop": ["\n\n"]},
    {"temperature": 0.0, "max_tokens": 12, "frequency_penalty": 0.3, "logit_bias": {"28": -5}},
]


async def chat(client: AsyncOpenAI, model: str, prompt: str, options: dict) -> str:
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], stream=True, **options
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def test_sixteen_mixed_streams_each_get_the_answer_they_get_alone(smollm2_app):
    model = smollm2_app.config.model.served_name
    prompts = [prompt["prompt"] for prompt in PROMPTS[:16]]
    http = AsyncOpenAI(base_url=f"{smollm2_app.http_url}/v1", api_key="none")
    async with Client(smollm2_app.grpc_address) as rpc, http:

        async def one(i: int) -> str:
            if i % 2:
                return await chat(http, model, prompts[i], HTTP_OPTIONS[i // 2 % 4])
            return (await rpc.generate(request(prompts[i], **GRPC_OPTIONS[i // 2 % 4]))).text

        together = await asyncio.gather(*(one(i) for i in range(16)))
        alone = [await one(i) for i in range(16)]
    assert all(together)
    assert together == alone


async def test_speculation_statistics_compare_on_with_off_on_one_server(smollm2_app):
    async with Client(smollm2_app.grpc_address) as client:
        off = await client.generate(request(PROMPTS[16]["prompt"], speculation="off", max_new_tokens=48))
        on = await client.generate(request(PROMPTS[16]["prompt"], max_new_tokens=48))
    assert off.text == on.text
    assert off.metrics.num_spec_steps == len(off.token_ids) - 1
    assert off.metrics.num_draft_tokens == 0
    assert on.metrics.num_spec_steps < off.metrics.num_spec_steps
    assert sum(on.metrics.acceptance_histogram) == on.metrics.num_spec_steps
    assert on.metrics.num_spec_steps + on.metrics.num_accepted_draft_tokens == len(on.token_ids) - 1
