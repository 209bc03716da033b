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

class Speculation(_message.Message):
    __slots__ = ("policy", "draft_tokens")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    policy: SpeculationPolicy
    draft_tokens: int
    def __init__(self, policy: _Optional[_Union[SpeculationPolicy, str]] = ..., draft_tokens: _Optional[int] = ...) -> None: ...

class GenerateTokensRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "prompt_len", "sampling", "stopping", "speculation", "model_fingerprint", "num_losses")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSSES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    sampling: _common_pb2.SamplingParams
    stopping: _common_pb2.StoppingParams
    speculation: Speculation
    model_fingerprint: str
    num_losses: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stopping: _Optional[_Union[_common_pb2.StoppingParams, _Mapping]] = ..., speculation: _Optional[_Union[Speculation, _Mapping]] = ..., model_fingerprint: _Optional[str] = ..., num_losses: _Optional[int] = ...) -> None: ...

class TokenChunk(_message.Message):
    __slots__ = ("token_ids", "logprobs", "finish_reason", "timings", "decode_pass", "model_fingerprint", "num_losses", "prompt_logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DECODE_PASS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_LOSSES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _common_pb2.TokenLogprobs
    finish_reason: _common_pb2.FinishReason
    timings: RequestTimings
    decode_pass: DecodePass
    model_fingerprint: str
    num_losses: int
    prompt_logprobs: _common_pb2.PromptLogprobs
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., timings: _Optional[_Union[RequestTimings, _Mapping]] = ..., decode_pass: _Optional[_Union[DecodePass, _Mapping]] = ..., model_fingerprint: _Optional[str] = ..., num_losses: _Optional[int] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class DecodePass(_message.Message):
    __slots__ = ("num_drafts", "num_accepted_drafts", "num_spec_tokens")
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SPEC_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_drafts: int
    num_accepted_drafts: int
    num_spec_tokens: int
    def __init__(self, num_drafts: _Optional[int] = ..., num_accepted_drafts: _Optional[int] = ..., num_spec_tokens: _Optional[int] = ...) -> None: ...

class RequestTimings(_message.Message):
    __slots__ = ("queue_ns", "prefill_ns", "decode_ns", "num_preemptions")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_NS_FIELD_NUMBER: _ClassVar[int]
    DECODE_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    prefill_ns: int
    decode_ns: int
    num_preemptions: int
    def __init__(self, queue_ns: _Optional[int] = ..., prefill_ns: _Optional[int] = ..., decode_ns: _Optional[int] = ..., num_preemptions: _Optional[int] = ...) -> None: ...
