"""Log-probabilities in the shapes of OpenAI's two APIs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dflash_ray.pb import common_pb2

_LOWEST = -9999.0  # stands for minus infinity, which JSON has no word for; vLLM's value


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability, and the likeliest tokens in its place, best first; no value: nothing was before."""

    token_id: int
    value: float | None
    top: list[tuple[int, float]]


def rows(token_ids: Sequence[int], part: common_pb2.TokenLogprobs) -> Iterator[TokenLogprob]:
    """The columns of a message for the first of these tokens, token by token."""
    n = part.num_top
    for i, (token, value) in enumerate(zip(token_ids, part.chosen, strict=False)):
        ids, values = part.top_token_ids[i * n : (i + 1) * n], part.top_logprobs[i * n : (i + 1) * n]
        yield TokenLogprob(token, _finite(value), [(t, _finite(v)) for t, v in zip(ids, values, strict=True)])


def _finite(value: float) -> float:
    return value if value > _LOWEST else _LOWEST


def chat_logprobs(tokens: Sequence[TokenLogprob], text_of: Callable[[int], str]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = text_of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(token.token_id, token.value), "top_logprobs": [entry(*pair) for pair in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[TokenLogprob], text_of: Callable[[int], str], text_offset: int
) -> dict[str, Any]:
    """`logprobs` of a completion's choice whose text so far has `text_offset` characters."""
    texts = [text_of(token.token_id) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(text_offset)
        text_offset += len(text)
    return {
        "text_offset": offsets,
        "token_logprobs": [token.value for token in tokens],
        "tokens": texts,
        "top_logprobs": [_named(token, text_of) for token in tokens],
    }


def _named(token: TokenLogprob, text_of: Callable[[int], str]) -> dict[str, float] | None:
    """The likeliest tokens by their text, the chosen one always among them."""
    if token.value is None:
        return None
    named: dict[str, float] = {}
    for token_id, value in [*token.top, (token.token_id, token.value)]:
        named.setdefault(text_of(token_id), value)
    return named
