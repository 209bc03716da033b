"""The options of a gRPC request as GenerationOptions, and their names in `generation.proto` for errors."""

from __future__ import annotations

from typing import Any

from dflash_ray.core.errors import InvalidRequestError
from dflash_ray.gateway.bodies import check
from dflash_ray.gateway.options import GenerationOptions
from dflash_ray.pb import common_pb2, generation_pb2, router_pb2

_PATHS = {
    "temperature": "temperature",
    "n": "sampling.num_sequences",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "seed": "sampling.seed",
    "verify_mode": "sampling.verify_mode",
    "presence_penalty": "decoding.presence_penalty",
    "frequency_penalty": "decoding.frequency_penalty",
    "repetition_penalty": "decoding.repetition_penalty",
    "logit_bias": "decoding.logit_bias",
    "max_tokens": "stopping.max_new_tokens",
    "min_tokens": "stopping.min_new_tokens",
    "stop": "stopping.stop_strings",
    "stop_token_ids": "stopping.stop_token_ids",
    "include_stop_str_in_output": "stopping.include_stop_strings",
    "ignore_eos": "stopping.ignore_eos",
    "cache_salt": "cache_salt",
}
_POLICIES = {
    router_pb2.SPECULATION_POLICY_UNSPECIFIED: None,
    router_pb2.SPECULATION_POLICY_ADAPTIVE: "adaptive",
    router_pb2.SPECULATION_POLICY_FIXED: "fixed",
    router_pb2.SPECULATION_POLICY_OFF: "off",
}
_MODES = {
    common_pb2.VERIFY_MODE_UNSPECIFIED: "coupled",
    common_pb2.VERIFY_MODE_COUPLED: "coupled",
    common_pb2.VERIFY_MODE_REJECTION: "rejection",
}


def options_of(message: generation_pb2.GenerateRequest) -> GenerationOptions:
    """The checked options. Raises InvalidRequestError that names the option; `renamed` gives the message's name."""
    values = {name: value for name, path in _PATHS.items() if (value := _value(message, path)) is not None}
    if not values["n"]:
        del values["n"]
    # An enum's unknown number goes on as it is, and is refused by its field.
    values["verify_mode"] = _MODES.get(message.sampling.verify_mode, message.sampling.verify_mode)
    speculation = message.speculation
    values["speculation"] = {"policy": _POLICIES.get(speculation.policy, speculation.policy)}
    if speculation.HasField("draft_tokens"):
        values["speculation"]["draft_tokens"] = speculation.draft_tokens
    return check(GenerationOptions, values)


def _value(message: generation_pb2.GenerateRequest, path: str) -> Any:
    """A field's value in Python's types; None for an optional field that is not given."""
    owner: Any = message
    *sections, name = path.split(".")
    for section in sections:
        owner = getattr(owner, section)
    field = owner.DESCRIPTOR.fields_by_name[name]
    if field.has_presence and not owner.HasField(name):
        return None
    value = getattr(owner, name)
    if name == "logit_bias":
        return dict(value)
    return list(value) if field.is_repeated else value


def renamed(error: InvalidRequestError) -> InvalidRequestError:
    """The error under the message's names in place of the options'."""
    name, dot, rest = (error.param or "").partition(".")
    return InvalidRequestError(error.message, f"{_PATHS.get(name, name)}{dot}{rest}" or None, error.code)
