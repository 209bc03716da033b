"""LiteLLM's completion functions against an OpenAI-compatible server. Arguments: URL, model."""

import asyncio
import sys

import litellm

URL, MODEL = sys.argv[1:]
litellm.telemetry = False
HELLO = {"role": "user", "content": "Say hello in one short sentence."}
OPTIONS = {
    "model": f"hosted_vllm/{MODEL}",
    "api_base": f"{URL}/v1",
    "api_key": "none",
    "temperature": 0,
    "max_tokens": 16,
}

first = litellm.completion(messages=[HELLO], **OPTIONS)
text = first.choices[0].message.content
assert text and first.usage.completion_tokens <= 16
history = [HELLO, first.choices[0].message.model_dump(), {"role": "user", "content": "Again."}]
assert litellm.completion(messages=history, **OPTIONS).choices[0].message.content
parts = litellm.completion(messages=[HELLO], stream=True, stream_options={"include_usage": True}, **OPTIONS)
assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == text
assert asyncio.run(litellm.acompletion(messages=[HELLO], **OPTIONS)).choices[0].message.content == text
plain = litellm.text_completion(**{**OPTIONS, "model": f"text-completion-openai/{MODEL}"}, prompt="One two three")
assert plain.choices[0].text
try:
    litellm.completion(messages=[{"role": "user", "content": "word " * 9000}], **OPTIONS)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("a prompt beyond the context was answered")
print(text)
