"""OpenAI request bodies, with vLLM's extensions and our `speculation`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dflash_ray.gateway.bodies import Body
from dflash_ray.gateway.options import Entries, GenerationOptions, TokenId

# What would change the answer and is not served: fields, with the values that change nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    # tools
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "web_search_options": (),
    # the answer's form
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "grammar": (),
    "structural_tag": (),
    "modalities": (["text"],),
    "audio": (),
    "suffix": (),
    # which tokens may come
    "allowed_token_ids": (),
    "bad_words": (),
    "logits_processors": (),
    "logit_processors": (),
    "custom_logit_processor": (),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    # the prompt
    "chat_template": (),
    "documents": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
}

# Known, and without effect on the text: not worth a line in the log.
WITHOUT_EFFECT = frozenset(
    {
        *_REFUSED, "best_of", "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key",
        "prompt_cache_retention", "safety_identifier", "reasoning_effort", "verbosity", "prediction", "length_penalty",
        "spaces_between_special_tokens", "priority", "request_id", "add_special_tokens",
    }
)  # fmt: skip


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _CommonRequest(GenerationOptions):
    refused = _REFUSED

    model: str | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> _CommonRequest:
        if self.best_of not in (None, self.n):
            raise PydanticCustomError(
                "unsupported_parameter", "must equal n: all choices are returned", {"field": "best_of"}
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """The limit on new tokens under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class ContentPart(Body):
    """A piece of text; `refusal` parts come back from an answer that refused."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str = ""
    refusal: str = ""

    @property
    def content(self) -> str:
        return self.refusal if self.type == "refusal" else self.text


class ChatMessage(Body):
    """A message as clients write it, or as an answer's own message comes back in the next turn."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"tool_calls": (), "function_call": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant"]
    content: Entries[ContentPart] | None = None
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: object) -> object:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "Field required: the message has no content")
        return self

    def as_template_message(self) -> dict[str, str]:
        """role and text, as chat templates know them."""
        text = "".join(part.content for part in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletionRequest(_CommonRequest):
    messages: Entries[ChatMessage] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens wanted beside the chosen one; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_CommonRequest):
    prompt: str | Entries[int] | Entries[str] | Entries[Entries[int]]
    max_tokens: int | None = Field(16, ge=0, le=2**31 - 1)
    add_special_tokens: bool = True
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _say_what_a_prompt_is(cls, value: object, check: ValidatorFunctionWrapHandler) -> object:
        try:
            return check(value)
        except ValidationError:
            raise PydanticCustomError("prompt", "must be text, token ids, or a list of either") from None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.token_limit == 0 and not self.echo:
            raise PydanticCustomError("no_tokens", "must be at least 1 without echo", {"field": "max_tokens"})
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens wanted beside the chosen one; None: no log-probabilities at all."""
        return self.logprobs


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Entries[ChatMessage] | None = Field(None, min_length=1)
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Entries[TokenId]
