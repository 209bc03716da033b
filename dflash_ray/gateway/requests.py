"""One checked request, whichever API it came by. What is wrong with it is an InvalidRequestError naming the field."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.errors import InvalidRequestError, UnknownModelError
from dflash_ray.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from dflash_ray.gateway.tokenizer import ChatTokenizer
from dflash_ray.gateway.traffic import TrafficRecorder
from dflash_ray.pb import common_pb2, generation_pb2, router_pb2

_POLICIES = {
    None: router_pb2.SPECULATION_POLICY_UNSPECIFIED,
    "adaptive": router_pb2.SPECULATION_POLICY_ADAPTIVE,
    "fixed": router_pb2.SPECULATION_POLICY_FIXED,
    "off": router_pb2.SPECULATION_POLICY_OFF,
}
_MODES = {"coupled": common_pb2.VERIFY_MODE_COUPLED, "rejection": common_pb2.VERIFY_MODE_REJECTION}
_MAX_STOP_TOKEN_IDS = 128
_MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate; `prompt_ids` are final."""

    request_id: str
    prompt_ids: list[int]
    sampling: common_pb2.SamplingParams
    stopping: common_pb2.StoppingParams
    speculation: router_pb2.Speculation
    num_choices: int = 1
    stop_strings: list[str] = field(default_factory=list)
    include_stop_strings: bool = False
    eos_ids: tuple[int, ...] = ()  # stop tokens that do not count as text


class RequestBuilder:
    """Checks requests against the model and this gateway's limits; accepted chats are recorded where that is wanted.

    Attributes:
        max_model_len: tokens of a prompt and its answer together.
    """

    def __init__(
        self, config: DflashRayConfig, tokenizer: ChatTokenizer, traffic: TrafficRecorder | None = None
    ) -> None:
        self._config = config
        self._limits = config.gateway
        self._tokenizer = tokenizer
        self._traffic = traffic
        self.max_model_len = config.sequence_limit(tokenizer.context_length)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModelError unless the name is the served model's or empty."""
        if name and name != self._config.model.served_name:
            raise UnknownModelError(
                f"model {name!r} is not served here; use {self._config.model.served_name!r}", "model"
            )

    def from_chat(self, body: ChatCompletionRequest, request_id: str) -> GenerationRequest:
        """A chat completion."""
        messages = [message.as_template_message() for message in body.messages]
        wants_logprobs = body.logprobs or body.top_logprobs is not None
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", "top_logprobs")
        max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        prompt_ids = self._tokenizer.encode_chat(messages, body.chat_template_kwargs)
        num_logprobs = (body.top_logprobs or 0) if wants_logprobs else None
        request = self._from_openai(body, request_id, prompt_ids, "messages", max_tokens, num_logprobs, "top_logprobs")
        if self._traffic is not None:
            self._traffic.record(messages)
        return request

    def from_completion(self, body: CompletionRequest, request_id: str) -> list[GenerationRequest]:
        """A completion; one request for each prompt of a batch."""
        prompts = _prompts(body.prompt)
        requests = []
        for i, prompt in enumerate(prompts):
            ids = self._tokenizer.encode(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt
            name = f"{request_id}-{i}" if len(prompts) > 1 else request_id
            requests.append(self._from_openai(body, name, ids, "prompt", body.max_tokens, body.logprobs, "logprobs"))
        return requests

    def _from_openai(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        request_id: str,
        prompt_ids: list[int],
        prompt_field: str,
        max_tokens: int | None,
        num_logprobs: int | None,
        logprobs_field: str,
    ) -> GenerationRequest:
        stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
        self._check_logprobs(num_logprobs, logprobs_field)
        given = {name: getattr(body, name) for name in body.model_fields_set if getattr(body, name) is not None}
        chosen = {**self._tokenizer.sampling_defaults, **given}
        sampling = common_pb2.SamplingParams(
            temperature=chosen.get("temperature", body.temperature),
            top_k=max(0, int(chosen.get("top_k", body.top_k))),
            top_p=chosen.get("top_p", body.top_p),
            min_p=chosen.get("min_p", body.min_p),
            seed=_seed(body.seed),
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=chosen.get("repetition_penalty", body.repetition_penalty),
            mode=_MODES[body.verify_mode],
            num_logprobs=num_logprobs,
        )
        speculation = router_pb2.Speculation(
            policy=_POLICIES[body.speculation.policy], draft_tokens=body.speculation.draft_tokens
        )
        return self._build(
            request_id,
            prompt_ids,
            prompt_field,
            sampling,
            speculation,
            logit_bias=body.logit_bias,
            max_new_tokens=max_tokens,
            min_new_tokens=body.min_tokens,
            stop_token_ids=body.stop_token_ids,
            ignore_eos=body.ignore_eos,
            num_choices=body.n,
            stop_strings=stops,
            include_stop_strings=body.include_stop_str_in_output,
        )

    def from_grpc(self, message: generation_pb2.GenerateRequest, request_id: str) -> GenerationRequest:
        """The gRPC twin of both."""
        self.check_model(message.model)
        kind = message.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequestError("give a prompt: text, token_ids or chat", "prompt")
        prompt_ids = self._grpc_prompt(message, kind)
        random, decoding, stopping = message.sampling, message.decoding, message.stopping
        defaults = self._tokenizer.sampling_defaults
        temperature = message.temperature if message.HasField("temperature") else defaults.get("temperature", 1.0)
        _check_range("temperature", temperature, 0, 10)
        min_p = random.min_p if random.HasField("min_p") else defaults.get("min_p", 0.0)
        _check_range("sampling.min_p", min_p, 0, 1)
        top_p = random.top_p if random.HasField("top_p") else defaults.get("top_p", 1.0)
        _check_range("sampling.top_p", top_p, 0, 1, is_open_below=True)
        top_k = random.top_k if random.HasField("top_k") else max(0, int(defaults.get("top_k", 0)))
        _check_range("decoding.presence_penalty", decoding.presence_penalty, -2, 2)
        _check_range("decoding.frequency_penalty", decoding.frequency_penalty, -2, 2)
        has_repetition = decoding.HasField("repetition_penalty")
        repetition = decoding.repetition_penalty if has_repetition else defaults.get("repetition_penalty", 1.0)
        _check_range("decoding.repetition_penalty", repetition, 0, 10, is_open_below=True)
        for value in decoding.logit_bias.values():
            _check_range("decoding.logit_bias", value, -100, 100)
        if message.speculation.draft_tokens > 31:
            raise InvalidRequestError("must be at most 31", "speculation.draft_tokens")
        if stopping.HasField("max_new_tokens") and not stopping.max_new_tokens:
            raise InvalidRequestError("must be at least 1", "stopping.max_new_tokens")
        if "" in stopping.stop_strings:
            raise InvalidRequestError("stop strings must not be empty", "stopping.stop_strings")
        num_logprobs = message.response.output_logprobs if message.response.HasField("output_logprobs") else None
        self._check_logprobs(num_logprobs, "response.output_logprobs")
        sampling = common_pb2.SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=_seed(random.seed if random.HasField("seed") else None),
            presence_penalty=decoding.presence_penalty,
            frequency_penalty=decoding.frequency_penalty,
            repetition_penalty=repetition,
            mode=random.verify_mode,
            num_logprobs=num_logprobs,
        )
        request = self._build(
            request_id,
            prompt_ids,
            kind,
            sampling,
            message.speculation,
            logit_bias=decoding.logit_bias,
            max_new_tokens=stopping.max_new_tokens if stopping.HasField("max_new_tokens") else None,
            min_new_tokens=stopping.min_new_tokens,
            stop_token_ids=stopping.stop_token_ids,
            ignore_eos=stopping.ignore_eos,
            num_choices=max(1, random.num_sequences),
            stop_strings=list(stopping.stop_strings),
            include_stop_strings=stopping.include_stop_strings,
        )
        if kind == "chat" and self._traffic is not None:
            self._traffic.record(grpc_messages(message.chat))
        return request

    def _grpc_prompt(self, message: generation_pb2.GenerateRequest, kind: str) -> list[int]:
        if kind == "text":
            return self._tokenizer.encode(message.text, add_special_tokens=True)
        if kind == "token_ids":
            return list(message.token_ids.ids)
        return self._tokenizer.encode_chat(grpc_messages(message.chat), grpc_template_variables(message.chat))

    def _check_logprobs(self, num_logprobs: int | None, name: str) -> None:
        if num_logprobs is not None and num_logprobs > self._limits.max_logprobs:
            raise InvalidRequestError(f"must be at most {self._limits.max_logprobs}", name)

    def _build(
        self,
        request_id: str,
        prompt_ids: list[int],
        prompt_field: str,
        sampling: common_pb2.SamplingParams,
        speculation: router_pb2.Speculation,
        *,
        logit_bias: Mapping[int, float],
        max_new_tokens: int | None,
        min_new_tokens: int,
        stop_token_ids: Sequence[int],
        ignore_eos: bool,
        num_choices: int,
        stop_strings: list[str],
        include_stop_strings: bool,
    ) -> GenerationRequest:
        """The checks that both APIs share."""
        context = self.max_model_len
        self._check_prompt(prompt_ids, prompt_field, context)
        if num_choices > self._limits.max_choices:
            raise InvalidRequestError(f"must be at most {self._limits.max_choices}", "n")
        if len(stop_strings) > self._limits.max_stop_strings:
            raise InvalidRequestError(
                f"has {len(stop_strings)} strings; at most {self._limits.max_stop_strings}", "stop"
            )
        if len(stop_token_ids) > _MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(f"at most {_MAX_STOP_TOKEN_IDS} are taken", "stop_token_ids")
        if len(logit_bias) > _MAX_LOGIT_BIAS:
            raise InvalidRequestError(f"at most {_MAX_LOGIT_BIAS} entries are taken", "logit_bias")
        for name, ids in (("logit_bias", logit_bias), ("stop_token_ids", stop_token_ids)):
            if any(not 0 <= token < self._tokenizer.vocab_size for token in ids):
                raise InvalidRequestError(f"token ids must be below {self._tokenizer.vocab_size}", name)
        room = context - len(prompt_ids)
        limit = room if max_new_tokens is None else min(max_new_tokens, room)
        if min_new_tokens > limit:
            raise InvalidRequestError(
                f"is {min_new_tokens}, above the {limit} tokens that may be generated", "min_tokens"
            )
        eos_ids = () if ignore_eos else self._tokenizer.eos_ids
        sampling.bias_token_ids.extend(logit_bias.keys())
        sampling.bias_values.extend(logit_bias.values())
        stopping = common_pb2.StoppingParams(
            max_new_tokens=limit, min_new_tokens=min_new_tokens, stop_token_ids=sorted({*eos_ids, *stop_token_ids})
        )
        return GenerationRequest(
            request_id,
            prompt_ids,
            sampling,
            stopping,
            speculation,
            num_choices,
            stop_strings,
            include_stop_strings,
            eos_ids,
        )

    def _check_prompt(self, prompt_ids: list[int], name: str, context: int) -> None:
        if not prompt_ids:
            raise InvalidRequestError("must not be empty", name)
        if any(not 0 <= token < self._tokenizer.vocab_size for token in prompt_ids):
            raise InvalidRequestError(f"token ids must be below {self._tokenizer.vocab_size}", name)
        if len(prompt_ids) >= context:
            raise InvalidRequestError(
                f"has {len(prompt_ids)} tokens, but prompt and answer must fit the context of {context}; shorten it",
                name,
            )


def grpc_messages(chat: generation_pb2.ChatMessages) -> list[dict[str, str]]:
    """Messages for the template. Raises InvalidRequestError for none or an unknown role."""
    if not chat.messages:
        raise InvalidRequestError("must have at least one message", "chat.messages")
    for message in chat.messages:
        if message.role not in ("system", "user", "assistant"):
            raise InvalidRequestError(f"role {message.role!r} is not system, user or assistant", "chat.messages.role")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def grpc_template_variables(chat: generation_pb2.ChatMessages) -> dict[str, Any]:
    """Values for the template; whole numbers, which a Struct holds as doubles, are integers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    variables: dict[str, Any] = plain(MessageToDict(chat.chat_template_kwargs))
    return variables


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError("must not be empty", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _seed(seed: int | None) -> int:
    return secrets.randbits(64) if seed is None else seed % 2**64


def _check_range(name: str, value: float, low: float, high: float, is_open_below: bool = False) -> None:
    is_inside = math.isfinite(value) and (low < value if is_open_below else low <= value) and value <= high
    if not is_inside:
        raise InvalidRequestError(f"is {value}; it must lie between {low} and {high}", name)
