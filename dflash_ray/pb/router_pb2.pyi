from dflash_ray.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SpeculationPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPECULATION_POLICY_UNSPECIFIED: _ClassVar[SpeculationPolicy]
    SPECULATION_POLICY_ADAPTIVE: _ClassVar[SpeculationPolicy]
    SPECULATION_POLICY_FIXED: _ClassVar[SpeculationPolicy]
    SPECULATION_POLICY_OFF: _ClassVar[SpeculationPolicy]
SPECULATION_POLICY_UNSPECIFIED: SpeculationPolicy
SPECULATION_POLICY_ADAPTIVE: SpeculationPolicy
SPECULATION_POLICY_FIXED: SpeculationPolicy
SPECULATION_POLICY_OFF: SpeculationPolicy

class RouterRequest(_message.Message):
    __slots__ = ("hello", "open", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    open: _containers.RepeatedCompositeFieldContainer[OpenCall]
    cancel: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., open: _Optional[_Iterable[_Union[OpenCall, _Mapping]]] = ..., cancel: _Optional[_Iterable[int]] = ...) -> None: ...

class RouterResponse(_message.Message):
    __slots__ = ("hello", "progress")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    progress: Progress
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("protocol_version",)
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("protocol_version",)
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ...) -> None: ...

class OpenCall(_message.Message):
    __slots__ = ("call_id", "timeout_ms", "request")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    timeout_ms: int
    request: GenerateTokensRequest
    def __init__(self, call_id: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., request: _Optional[_Union[GenerateTokensRequest, _Mapping]] = ...) -> None: ...

class Speculation(_message.Message):
    __slots__ = ("policy", "draft_tokens")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    policy: SpeculationPolicy
    draft_tokens: int
    def __init__(self, policy: _Optional[_Union[SpeculationPolicy, str]] = ..., draft_tokens: _Optional[int] = ...) -> None: ...

class GenerateTokensRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "prompt_len", "sampling", "stopping", "speculation", "model_fingerprint", "num_losses", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSSES_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    sampling: _common_pb2.SamplingParams
    stopping: _common_pb2.StoppingParams
    speculation: Speculation
    model_fingerprint: str
    num_losses: int
    cache_salt: bytes
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stopping: _Optional[_Union[_common_pb2.StoppingParams, _Mapping]] = ..., speculation: _Optional[_Union[Speculation, _Mapping]] = ..., model_fingerprint: _Optional[str] = ..., num_losses: _Optional[int] = ..., cache_salt: _Optional[bytes] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("call_ids", "num_tokens", "token_ids", "finish_reasons", "is_decode_pass", "num_drafts", "num_accepted_drafts", "num_spec_tokens", "extras")
    CALL_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    IS_DECODE_PASS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SPEC_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    call_ids: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    token_ids: bytes
    finish_reasons: _containers.RepeatedScalarFieldContainer[_common_pb2.FinishReason]
    is_decode_pass: _containers.RepeatedScalarFieldContainer[bool]
    num_drafts: _containers.RepeatedScalarFieldContainer[int]
    num_accepted_drafts: _containers.RepeatedScalarFieldContainer[int]
    num_spec_tokens: _containers.RepeatedScalarFieldContainer[int]
    extras: _containers.RepeatedCompositeFieldContainer[EntryExtras]
    def __init__(self, call_ids: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., token_ids: _Optional[bytes] = ..., finish_reasons: _Optional[_Iterable[_Union[_common_pb2.FinishReason, str]]] = ..., is_decode_pass: _Optional[_Iterable[bool]] = ..., num_drafts: _Optional[_Iterable[int]] = ..., num_accepted_drafts: _Optional[_Iterable[int]] = ..., num_spec_tokens: _Optional[_Iterable[int]] = ..., extras: _Optional[_Iterable[_Union[EntryExtras, _Mapping]]] = ...) -> None: ...

class EntryExtras(_message.Message):
    __slots__ = ("entry", "model_fingerprint", "logprobs", "prompt_logprobs", "error", "num_cached_tokens")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    entry: int
    model_fingerprint: str
    logprobs: _common_pb2.TokenLogprobs
    prompt_logprobs: _common_pb2.PromptLogprobs
    error: CallError
    num_cached_tokens: int
    def __init__(self, entry: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., logprobs: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ..., error: _Optional[_Union[CallError, _Mapping]] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class CallError(_message.Message):
    __slots__ = ("code", "message", "field", "num_losses")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSSES_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    field: str
    num_losses: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., num_losses: _Optional[int] = ...) -> None: ...
