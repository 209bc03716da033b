"""Answers in OpenAI's shape, with vLLM's `metrics.speculative_decoding`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Literal

from dflash_ray.core.errors import RequestError
from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.gateway.choice import ChoiceDelta
from dflash_ray.gateway.openai_logprobs import TokenLogprob, chat_logprobs, completion_logprobs, rows
from dflash_ray.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.pb import common_pb2
from dflash_ray.text.tokenizer import ChatTokenizer

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


def error_object(error: RequestError) -> dict[str, Any]:
    """OpenAI's error body."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_ANY_TEXT = "\0text\0"


def event(values: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {_to_json(values)}\n\n"


@dataclass
class _Choice:
    """What a choice has got so far.

    Attributes:
        request: what was asked; its prompt comes first where it is echoed.
        num_tokens: how many it has got; of events that bring text alone nothing else is kept.
        num_logged: characters that the log-probabilities so far stand for.
        num_cached: prompt tokens whose rows were found computed, once its first token is there.
        around_text: an event that brings text and nothing else, up to the text and after it.
    """

    request: GenerationRequest
    texts: list[str] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop: str | int | None = None
    is_open: bool = False
    num_tokens: int = 0
    num_logged: int = 0
    num_cached: int | None = None
    around_text: tuple[str, str] | None = None


class ResponseWriter:
    """Collects the deltas of one HTTP request and writes chunks or the whole answer.

    Speculation metrics are given for one choice only.

    Args:
        generations: one for each prompt of the request.
    """

    def __init__(
        self,
        kind: Kind,
        request_id: str,
        model: str,
        tokenizer: ChatTokenizer,
        body: ChatCompletionRequest | CompletionRequest,
        generations: Sequence[GenerationRequest],
    ) -> None:
        self._kind = kind
        self._model = model
        self._tokenizer = tokenizer
        self._id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{request_id}"
        self._created = int(time.time())
        self._with_token_ids = body.return_token_ids
        self._with_logprobs = body.num_logprobs is not None
        self._stream_options = body.stream_options
        self._brings_more_than_text = (
            self._with_token_ids or self._with_logprobs or body.stream_options.continuous_usage_stats
        )
        self._num_prompt_tokens = sum(len(generation.prompt_ids) for generation in generations)
        self._choices = [_Choice(generation) for generation in generations for _ in range(generation.num_choices)]
        self._stats: AcceptanceStats | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Takes a delta into the totals and the whole answer."""
        choice = self._choices[delta.index]
        choice.texts.append(delta.text)
        choice.token_ids += delta.token_ids
        choice.num_tokens += len(delta.token_ids)
        if delta.prompt_logprobs is not None:
            known = len(choice.prompt_logprobs) + 1
            choice.prompt_logprobs += rows(choice.request.prompt_ids[known:], delta.prompt_logprobs)
        if delta.num_cached_tokens is not None:
            choice.num_cached = delta.num_cached_tokens
        if delta.logprobs is not None:
            choice.logprobs += rows(delta.token_ids, delta.logprobs)
        if delta.finish_reason:
            choice.finish_reason = _FINISH_REASONS[delta.finish_reason]
            choice.stop = delta.stop
            self._stats = delta.stats if len(self._choices) == 1 else None

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far. Of a prompt that several choices share, those are cached that were so for all of them."""
        cached: dict[int, int] = {}
        for choice in self._choices:
            if choice.num_cached is not None:
                prompt = id(choice.request)
                cached[prompt] = min(choice.num_cached, cached.get(prompt, choice.num_cached))
        generated = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._num_prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = []
        for index, choice in enumerate(self._choices):
            content = self._message("".join([choice.request.echo or "", *choice.texts]))
            logprobs = [*_echoed(choice), *choice.logprobs]
            choices.append(self._choice_object(index, content, choice, logprobs, choice.token_ids))
        body = self._frame("chat.completion" if self._kind == "chat" else "text_completion", choices)
        return {**body, "usage": self.usage, "metrics": self._metrics()}

    def events(self, delta: ChoiceDelta) -> str:
        """The server-sent events of a delta."""
        choice = self._choices[delta.index]
        if not choice.is_open or delta.finish_reason or self._brings_more_than_text:
            return "".join(map(event, self.chunks(delta)))
        choice.num_tokens += len(delta.token_ids)
        if not delta.text:
            return ""
        if choice.around_text is None:
            chunk = self._chunk(self._choice_object(delta.index, self._delta(_ANY_TEXT), choice, [], []))
            before, _, after = event(chunk).rpartition(_to_json(_ANY_TEXT))
            choice.around_text = before, after
        before, after = choice.around_text
        return before + encode_basestring(delta.text) + after

    def chunks(self, delta: ChoiceDelta) -> Iterator[dict[str, Any]]:
        """The chunks of a delta, if it has anything to show yet. The very last also says how speculation went."""
        choice = self._choices[delta.index]
        first = len(choice.logprobs)
        self.add(delta)
        if not delta.token_ids and not delta.text and not delta.finish_reason:
            return
        if self._kind == "chat" and not choice.is_open:
            opening = {"index": delta.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            yield self._chunk({**opening, "finish_reason": None})
        if choice.request.echo is not None and not choice.is_open:
            opening = {"index": delta.index, "text": choice.request.echo}
            logprobs = self._logprobs(choice, _echoed(choice)) if self._with_logprobs else None
            yield self._chunk({**opening, "logprobs": logprobs, "finish_reason": None})
        choice.is_open = True
        shows_tokens = self._with_token_ids or self._with_logprobs
        if not (delta.text or delta.finish_reason or shows_tokens):
            return
        content = self._delta(delta.text)
        chunk = self._chunk(self._choice_object(delta.index, content, choice, choice.logprobs[first:], delta.token_ids))
        if all(other.finish_reason for other in self._choices):
            chunk["metrics"] = self._metrics()
        yield chunk

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """The chunk without choices that stream_options.include_usage asks for."""
        if self._stream_options.include_usage:
            yield {**self._frame(self._chunk_name, []), "usage": self.usage, "metrics": self._metrics()}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self._kind == "chat" else "text_completion"

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._frame(self._chunk_name, [choice])
        if self._stream_options.include_usage:
            chunk["usage"] = self.usage if self._stream_options.continuous_usage_stats else None
        return chunk

    def _frame(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _metrics(self) -> dict[str, Any]:
        return {"speculative_decoding": speculation_metrics(self._stats)}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self._kind == "chat" else {"text": text}

    def _message(self, text: str) -> dict[str, Any]:
        if self._kind == "completion":
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _choice_object(
        self, index: int, content: dict[str, Any], choice: _Choice, logprobs: list[TokenLogprob], token_ids: list[int]
    ) -> dict[str, Any]:
        made = {
            "index": index,
            **content,
            "logprobs": self._logprobs(choice, logprobs) if self._with_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop,
        }
        if self._with_token_ids:
            made["token_ids"] = token_ids
        return made

    def _logprobs(self, choice: _Choice, tokens: list[TokenLogprob]) -> dict[str, Any]:
        text_of = self._tokenizer.token_text
        if self._kind == "chat":
            return chat_logprobs(tokens, text_of)
        made = completion_logprobs(tokens, text_of, choice.num_logged)
        choice.num_logged += sum(len(text) for text in made["tokens"])
        return made


def _echoed(choice: _Choice) -> list[TokenLogprob]:
    """The prompt's tokens where they are echoed with log-probabilities; nothing comes before the first."""
    if choice.request.echo is None:
        return []
    return [TokenLogprob(choice.request.prompt_ids[0], None, []), *choice.prompt_logprobs]
