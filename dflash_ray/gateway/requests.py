"""One checked request, whichever API it came by. What is wrong with it is an InvalidRequestError naming the field."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from google.protobuf.json_format import MessageToDict

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.errors import InvalidRequestError, UnknownModelError, prompt_too_long
from dflash_ray.gateway.grpc_options import options_of, renamed
from dflash_ray.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from dflash_ray.gateway.options import GenerationOptions
from dflash_ray.gateway.traffic import TrafficRecorder
from dflash_ray.pb import common_pb2, generation_pb2, router_pb2
from dflash_ray.text.tokenizer import ChatTokenizer

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
    echo: str | None = None  # the prompt's text, where the answer begins with it
    is_prompt_only: bool = False  # no token is wanted
    cache_salt: bytes = b""  # a hash of the client's, which goes no further


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
        if name and name not in self._config.model.served_names:
            raise UnknownModelError(f"{name!r} is not served here; use {self._config.model.served_name!r}", "model")

    def check_size(self, values: Any) -> None:
        """Refuses a body with more entries than can be served, before each of them is checked."""
        if not isinstance(values, dict):
            return
        prompt, messages = values.get("prompt"), values.get("messages")
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], str | list):
            prompt = [prompt]
        if isinstance(prompt, list):
            self._check_num_prompts(prompt)
            for token_ids in prompt:
                if isinstance(token_ids, list) and len(token_ids) >= self.max_model_len:
                    raise prompt_too_long(len(token_ids), self.max_model_len, "prompt")
        if isinstance(messages, list) and len(messages) >= self.max_model_len:
            raise prompt_too_long(f"at least {len(messages)}", self.max_model_len, "messages")

    def _check_num_prompts(self, prompts: Sequence[object]) -> None:
        if len(prompts) > self._limits.max_prompts:
            raise InvalidRequestError(f"has {len(prompts)} prompts; at most {self._limits.max_prompts}", "prompt")

    def from_chat(self, body: ChatCompletionRequest, request_id: str) -> GenerationRequest:
        """A chat completion."""
        messages = [message.as_template_message() for message in body.messages]
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequestError("needs logprobs: true", "top_logprobs")
        self._check_logprobs(body.num_logprobs, "top_logprobs")
        prompt_ids = self._tokenizer.encode_chat(messages, body.chat_template_kwargs, self.max_model_len)
        request = self._build(request_id, prompt_ids, "messages", body, body.token_limit, body.num_logprobs)
        if self._traffic is not None:
            self._traffic.record(messages)
        return request

    def from_completion(self, body: CompletionRequest, request_id: str) -> list[GenerationRequest]:
        """A completion; one request for each prompt of a batch."""
        self._check_logprobs(body.num_logprobs, "logprobs")
        prompts = _prompts(body.prompt)
        self._check_num_prompts(prompts)
        requests = []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                ids = self._tokenizer.encode(prompt, body.add_special_tokens, self.max_model_len)
            else:
                ids = prompt
            name = f"{request_id}-{i}" if len(prompts) > 1 else request_id
            limit = body.token_limit
            request = self._build(name, ids, "prompt", body, 1 if limit == 0 else limit, body.num_logprobs)
            if body.echo:
                if body.num_logprobs is not None:
                    request.sampling.num_prompt_logprobs = body.num_logprobs
                text = prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)
                request = replace(request, echo=text, is_prompt_only=limit == 0)
            requests.append(request)
        return requests

    def from_grpc(self, message: generation_pb2.GenerateRequest, request_id: str) -> GenerationRequest:
        """The gRPC twin of both."""
        self.check_model(message.model)
        kind = message.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequestError("give a prompt: text, token_ids or chat", "prompt")
        num_logprobs = message.response.output_logprobs if message.response.HasField("output_logprobs") else None
        self._check_logprobs(num_logprobs, "response.output_logprobs")
        prompt_ids = self._grpc_prompt(message, kind)
        try:
            options = options_of(message)
            request = self._build(request_id, prompt_ids, kind, options, options.max_tokens, num_logprobs)
        except InvalidRequestError as error:
            raise renamed(error) from None
        if kind == "chat" and self._traffic is not None:
            self._traffic.record(grpc_messages(message.chat))
        return request

    def _grpc_prompt(self, message: generation_pb2.GenerateRequest, kind: str) -> list[int]:
        if kind == "text":
            return self._tokenizer.encode(message.text, True, self.max_model_len, kind)
        if kind == "token_ids":
            return list(message.token_ids.ids)
        chat = message.chat
        return self._tokenizer.encode_chat(grpc_messages(chat), grpc_template_variables(chat), self.max_model_len)

    def _check_logprobs(self, num_logprobs: int | None, name: str) -> None:
        if num_logprobs is not None and num_logprobs > self._limits.max_logprobs:
            raise InvalidRequestError(f"must be at most {self._limits.max_logprobs}", name)

    def _build(
        self,
        request_id: str,
        prompt_ids: list[int],
        prompt_field: str,
        options: GenerationOptions,
        max_tokens: int | None,
        num_logprobs: int | None,
    ) -> GenerationRequest:
        """The checks against the model and this gateway's limits, and the wire's messages."""
        defaults = self._tokenizer.sampling_defaults
        options = options.model_copy(update={key: defaults[key] for key in defaults.keys() - options.model_fields_set})
        room = self._room(prompt_ids, prompt_field)
        self._check_limits(options)
        limit = room if max_tokens is None else min(max_tokens, room)
        if options.min_tokens > limit:
            raise InvalidRequestError(
                f"is {options.min_tokens}, above the {limit} tokens that may be generated", "min_tokens"
            )
        sampling = common_pb2.SamplingParams(
            temperature=options.temperature,
            top_k=max(0, options.top_k),
            top_p=options.top_p,
            min_p=options.min_p,
            seed=_seed(options.seed),
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            repetition_penalty=options.repetition_penalty,
            bias_token_ids=options.logit_bias.keys(),
            bias_values=options.logit_bias.values(),
            mode=_MODES[options.verify_mode],
            num_logprobs=num_logprobs,
        )
        eos_ids = () if options.ignore_eos else self._tokenizer.eos_ids
        stopping = common_pb2.StoppingParams(
            max_new_tokens=limit,
            min_new_tokens=options.min_tokens,
            stop_token_ids=sorted({*eos_ids, *options.stop_token_ids}),
        )
        speculation = router_pb2.Speculation(
            policy=_POLICIES[options.speculation.policy], draft_tokens=options.speculation.draft_tokens
        )
        return GenerationRequest(
            request_id,
            prompt_ids,
            sampling,
            stopping,
            speculation,
            options.n,
            options.stop,
            options.include_stop_str_in_output,
            eos_ids,
            cache_salt=sha256(options.cache_salt.encode()).digest() if options.cache_salt else b"",
        )

    def _check_limits(self, options: GenerationOptions) -> None:
        """What one request may ask for at most."""
        counts = {
            "n": (options.n, self._limits.max_choices),
            "stop": (len(options.stop), self._limits.max_stop_strings),
            "stop_token_ids": (len(options.stop_token_ids), _MAX_STOP_TOKEN_IDS),
            "logit_bias": (len(options.logit_bias), _MAX_LOGIT_BIAS),
        }
        for name, (count, most) in counts.items():
            if count > most:
                raise InvalidRequestError(f"asks for {count}; at most {most} are served", name)
        self._check_vocabulary(options.logit_bias, "logit_bias")
        self._check_vocabulary(options.stop_token_ids, "stop_token_ids")

    def _check_vocabulary(self, token_ids: Iterable[int], name: str) -> None:
        if any(not 0 <= token < self._tokenizer.vocab_size for token in token_ids):
            raise InvalidRequestError(f"token ids must be below {self._tokenizer.vocab_size}", name)

    def _room(self, prompt_ids: list[int], name: str) -> int:
        """Tokens that may follow the prompt."""
        if not prompt_ids:
            raise InvalidRequestError("must not be empty", name)
        if len(prompt_ids) >= self.max_model_len:
            raise prompt_too_long(len(prompt_ids), self.max_model_len, name)
        self._check_vocabulary(prompt_ids, name)
        return self.max_model_len - len(prompt_ids)


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
