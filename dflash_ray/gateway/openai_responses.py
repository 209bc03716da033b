"""Answers in OpenAI's shape, with vLLM's `metrics.speculative_decoding`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.gateway.choice import ChoiceDelta
from dflash_ray.gateway.tokenizer import ChatTokenizer
from dflash_ray.pb import common_pb2

Kind = Literal["chat", "completion"]

_FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_CANCELLED: "abort",
    common_pb2.FINISH_REASON_ERROR: "error",
}


def speculation_metrics(stats: AcceptanceStats | None) -> dict[str, Any] | None:
    """The object that vLLM puts under `metrics.speculative_decoding`."""
    if stats is None:
        return None
    return {
        "mean_acceptance_length": stats.acceptance_length,
        "draft_acceptance_rate": stats.acceptance_rate,
        "acceptance_histogram": stats.histogram,
        "num_spec_steps": stats.num_steps,
        "num_accepted_draft_tokens": stats.num_accepted,
        "num_draft_tokens": stats.num_draft_tokens,
        "num_spec_tokens": stats.num_spec_tokens,
    }


@dataclass
class _Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop: str | int | None = None


class ResponseWriter:
    """Collects the deltas of one HTTP request and writes chunks or the whole answer.

    Args:
        num_prompt_tokens: over all prompts of the request.
        num_choices: over all prompts; speculation metrics are given for one choice only.
    """

    def __init__(
        self,
        kind: Kind,
        request_id: str,
        model: str,
        tokenizer: ChatTokenizer,
        num_prompt_tokens: int,
        num_choices: int,
        with_token_ids: bool = False,
    ) -> None:
        self._kind = kind
        self._model = model
        self._tokenizer = tokenizer
        self._id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{request_id}"
        self._created = int(time.time())
        self._num_prompt_tokens = num_prompt_tokens
        self._with_token_ids = with_token_ids
        self._choices = [_Choice() for _ in range(num_choices)]
        self._stats: AcceptanceStats | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Takes a delta into the totals and the whole answer."""
        choice = self._choices[delta.index]
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        if delta.logprobs is not None:
            choice.logprobs.append(delta.logprobs)
        if delta.finish_reason:
            choice.finish_reason = _FINISH_REASONS[delta.finish_reason]
            choice.stop = delta.stop
            self._stats = delta.stats if len(self._choices) == 1 else None

    @property
    def usage(self) -> dict[str, int]:
        generated = sum(len(choice.token_ids) for choice in self._choices)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._num_prompt_tokens + generated,
        }

    def _frame(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        is_chat = self._kind == "chat"
        choices = []
        for index, choice in enumerate(self._choices):
            content = {"message": {"role": "assistant", "content": choice.text}} if is_chat else {"text": choice.text}
            logprobs = self._logprobs(choice.token_ids, choice.logprobs)
            choices.append(self._choice(index, content, choice.finish_reason, choice.stop, logprobs, choice.token_ids))
        body = self._frame("chat.completion" if is_chat else "text_completion", choices)
        return {**body, "usage": self.usage, "metrics": {"speculative_decoding": speculation_metrics(self._stats)}}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The chunk that opens a chat choice with its role."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._frame("chat.completion.chunk", [choice])

    def chunk(self, delta: ChoiceDelta, is_last: bool) -> dict[str, Any]:
        """One chunk; the very last also says how speculation went."""
        is_chat = self._kind == "chat"
        content: dict[str, Any] = {"delta": {"content": delta.text}} if is_chat else {"text": delta.text}
        reason = _FINISH_REASONS.get(delta.finish_reason)
        logprobs = self._logprobs(delta.token_ids, [delta.logprobs] if delta.logprobs is not None else [])
        choice = self._choice(delta.index, content, reason, delta.stop, logprobs, delta.token_ids)
        body = self._frame("chat.completion.chunk" if is_chat else "text_completion", [choice])
        if is_last:
            body["metrics"] = {"speculative_decoding": speculation_metrics(self._stats)}
        return body

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk without choices that stream_options.include_usage asks for."""
        object_name = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        metrics = {"speculative_decoding": speculation_metrics(self._stats)}
        return {**self._frame(object_name, []), "usage": self.usage, "metrics": metrics}

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        reason: str | None,
        stop: str | int | None,
        logprobs: dict[str, Any] | None,
        token_ids: list[int],
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason, "stop_reason": stop}
        if self._with_token_ids:
            choice["token_ids"] = token_ids
        return choice

    def _logprobs(self, token_ids: list[int], parts: list[common_pb2.TokenLogprobs]) -> dict[str, Any] | None:
        if not parts:
            return None
        chosen = [value for part in parts for value in part.chosen]
        tops = [top for part in parts for top in _tops(part)]
        texts = [self._tokenizer.token_text(token) for token in token_ids]
        named = [[(self._tokenizer.token_text(token), value) for token, value in top] for top in tops]
        if self._kind == "chat":
            entries = zip(texts, chosen, named, strict=False)
            return {"content": [_chat_logprob(text, value, top) for text, value, top in entries]}
        offsets, at = [], 0
        for text in texts:
            offsets.append(at)
            at += len(text)
        return {
            "tokens": texts,
            "token_logprobs": chosen,
            "top_logprobs": [dict(top) for top in named],
            "text_offset": offsets,
        }


def _tops(part: common_pb2.TokenLogprobs) -> list[list[tuple[int, float]]]:
    """The likeliest tokens at each position, best first."""
    n = part.num_top
    pairs = list(zip(part.top_token_ids, part.top_logprobs, strict=True))
    return [pairs[i * n : (i + 1) * n] for i in range(len(part.chosen))]


def _chat_logprob(text: str, value: float, top: list[tuple[str, float]]) -> dict[str, Any]:
    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return {**entry(text, value), "top_logprobs": [entry(*item) for item in top]}
