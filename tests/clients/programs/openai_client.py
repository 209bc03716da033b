"""The openai package: sync, async, streaming, parsing, history, completions, errors. Arguments: URL, model."""

import asyncio
import sys

import openai
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
HELLO = {"role": "user", "content": "Say hello in one short sentence."}
OPTIONS = {"model": MODEL, "temperature": 0, "max_tokens": 16}


class Answer(BaseModel):
    text: str


def sync_calls(client: openai.OpenAI) -> str:
    assert client.models.list().data[0].id == MODEL
    first = client.chat.completions.create(messages=[HELLO], **OPTIONS)
    assert first.choices[0].message.content and first.usage.completion_tokens <= 16
    # The answer's own message object is the history of the next turn.
    history = [HELLO, first.choices[0].message, {"role": "user", "content": "Again."}]
    assert client.chat.completions.create(messages=history, **OPTIONS).choices[0].message.content
    dumped = [HELLO, first.choices[0].message.model_dump(), {"role": "user", "content": "Again."}]
    assert client.chat.completions.create(messages=dumped, **OPTIONS).choices[0].message.content
    stream = client.chat.completions.create(
        messages=[HELLO], stream=True, stream_options={"include_usage": True}, **OPTIONS
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == first.choices[0].message.content and chunks[-1].usage == first.usage
    # Answers that end by length are errors to the package's parsers.
    ending = {**OPTIONS, "max_tokens": 100, "stop": [".", "!", "?", ","]}
    parsed = client.chat.completions.parse(messages=[HELLO], **ending)
    assert parsed.choices[0].message.content and parsed.choices[0].message.parsed is None
    with client.chat.completions.stream(messages=[HELLO], **ending) as events:
        for _ in events:
            pass
        assert events.get_final_completion().choices[0].message.content == parsed.choices[0].message.content
    with_logprobs = client.chat.completions.create(messages=[HELLO], logprobs=True, top_logprobs=2, **OPTIONS)
    assert len(with_logprobs.choices[0].logprobs.content) == with_logprobs.usage.completion_tokens
    completion = client.completions.create(prompt=["One two", "A b"], logprobs=1, **OPTIONS)
    assert [choice.index for choice in completion.choices] == [0, 1]
    return text


def errors(client: openai.OpenAI) -> None:
    long = {"role": "user", "content": "word " * 9000}
    for options, kind, code in [
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
        (
            {"messages": [long]},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "unsupported_parameter"),
    ]:
        try:
            client.chat.completions.create(**{"messages": [HELLO], **OPTIONS, **options})
        except kind as error:
            assert error.code == code, error
        else:
            raise AssertionError(f"{options} was answered")
    try:
        client.chat.completions.parse(messages=[HELLO], response_format=Answer, **OPTIONS)
    except openai.BadRequestError as error:
        assert error.param == "response_format"
    else:
        raise AssertionError("a schema was promised and not kept")


async def async_calls(expected: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as client:

        async def streamed() -> str:
            stream = await client.chat.completions.create(messages=[HELLO], stream=True, **OPTIONS)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(streamed() for _ in range(4))) == [expected] * 4


with openai.OpenAI(base_url=f"{URL}/v1", api_key="none") as sync_client:
    answer = sync_calls(sync_client)
    errors(sync_client)
asyncio.run(async_calls(answer))
print(answer)
