from dflash_ray.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EntryStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENTRY_STATUS_UNSPECIFIED: _ClassVar[EntryStatus]
    ENTRY_STATUS_OK: _ClassVar[EntryStatus]
    ENTRY_STATUS_STALE: _ClassVar[EntryStatus]
    ENTRY_STATUS_UNKNOWN: _ClassVar[EntryStatus]
    ENTRY_STATUS_NO_PAGES: _ClassVar[EntryStatus]
    ENTRY_STATUS_FAILED: _ClassVar[EntryStatus]
    ENTRY_STATUS_ENDED: _ClassVar[EntryStatus]

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]

class FeaturesEndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURES_END_REASON_UNSPECIFIED: _ClassVar[FeaturesEndReason]
    FEATURES_END_REASON_UNKNOWN: _ClassVar[FeaturesEndReason]
    FEATURES_END_REASON_CLOSED: _ClassVar[FeaturesEndReason]
    FEATURES_END_REASON_SUPERSEDED: _ClassVar[FeaturesEndReason]
ENTRY_STATUS_UNSPECIFIED: EntryStatus
ENTRY_STATUS_OK: EntryStatus
ENTRY_STATUS_STALE: EntryStatus
ENTRY_STATUS_UNKNOWN: EntryStatus
ENTRY_STATUS_NO_PAGES: EntryStatus
ENTRY_STATUS_FAILED: EntryStatus
ENTRY_STATUS_ENDED: EntryStatus
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_BFLOAT16: DataType
FEATURES_END_REASON_UNSPECIFIED: FeaturesEndReason
FEATURES_END_REASON_UNKNOWN: FeaturesEndReason
FEATURES_END_REASON_CLOSED: FeaturesEndReason
FEATURES_END_REASON_SUPERSEDED: FeaturesEndReason

class TargetRequest(_message.Message):
    __slots__ = ("hello", "step", "close")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    hello: TargetHello
    step: Step
    close: CloseSequences
    def __init__(self, hello: _Optional[_Union[TargetHello, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., close: _Optional[_Union[CloseSequences, _Mapping]] = ...) -> None: ...

class TargetResponse(_message.Message):
    __slots__ = ("hello", "result")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    hello: TargetHelloReply
    result: StepResult
    def __init__(self, hello: _Optional[_Union[TargetHelloReply, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ...) -> None: ...

class TargetHello(_message.Message):
    __slots__ = ("protocol_version", "router_id", "epoch")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    router_id: str
    epoch: int
    def __init__(self, protocol_version: _Optional[int] = ..., router_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class TargetHelloReply(_message.Message):
    __slots__ = ("protocol_version", "target_id", "model_fingerprint", "feature_fingerprint", "vocab_size", "hidden_size", "max_model_len", "page_size", "num_pages", "max_batch_tokens", "tp_size", "colocated_draft_tokens")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TARGET_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    target_id: str
    model_fingerprint: str
    feature_fingerprint: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    max_batch_tokens: int
    tp_size: int
    colocated_draft_tokens: int
    def __init__(self, protocol_version: _Optional[int] = ..., target_id: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., feature_fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., page_size: _Optional[int] = ..., num_pages: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., tp_size: _Optional[int] = ..., colocated_draft_tokens: _Optional[int] = ...) -> None: ...

class OpenSequence(_message.Message):
    __slots__ = ("sequence_id", "token_ids", "prompt_len", "sampling", "stopping", "wants_features", "cache_salt")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    WANTS_FEATURES_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    sampling: _common_pb2.SamplingParams
    stopping: _common_pb2.StoppingParams
    wants_features: bool
    cache_salt: bytes
    def __init__(self, sequence_id: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stopping: _Optional[_Union[_common_pb2.StoppingParams, _Mapping]] = ..., wants_features: _Optional[bool] = ..., cache_salt: _Optional[bytes] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step_id", "epoch", "open", "close", "prefill_ids", "prefill_lens", "verify_ids", "base_lens", "num_drafts", "draft_token_ids", "draft_parents", "colocated_draft_ids", "colocated_num_drafts", "tree_width", "num_draft_candidates", "draft_candidate_ids", "draft_log_probs", "num_own_drafts", "least_own_log_prob", "is_ahead")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LENS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_IDS_FIELD_NUMBER: _ClassVar[int]
    BASE_LENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_PARENTS_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_DRAFT_IDS_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    TREE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    DRAFT_CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_OWN_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    LEAST_OWN_LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    IS_AHEAD_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    epoch: int
    open: _containers.RepeatedCompositeFieldContainer[OpenSequence]
    close: _containers.RepeatedScalarFieldContainer[int]
    prefill_ids: _containers.RepeatedScalarFieldContainer[int]
    prefill_lens: _containers.RepeatedScalarFieldContainer[int]
    verify_ids: _containers.RepeatedScalarFieldContainer[int]
    base_lens: _containers.RepeatedScalarFieldContainer[int]
    num_drafts: _containers.RepeatedScalarFieldContainer[int]
    draft_token_ids: bytes
    draft_parents: _containers.RepeatedScalarFieldContainer[int]
    colocated_draft_ids: _containers.RepeatedScalarFieldContainer[int]
    colocated_num_drafts: _containers.RepeatedScalarFieldContainer[int]
    tree_width: int
    num_draft_candidates: _containers.RepeatedScalarFieldContainer[int]
    draft_candidate_ids: _containers.RepeatedScalarFieldContainer[int]
    draft_log_probs: _containers.RepeatedScalarFieldContainer[float]
    num_own_drafts: _containers.RepeatedScalarFieldContainer[int]
    least_own_log_prob: float
    is_ahead: bool
    def __init__(self, step_id: _Optional[int] = ..., epoch: _Optional[int] = ..., open: _Optional[_Iterable[_Union[OpenSequence, _Mapping]]] = ..., close: _Optional[_Iterable[int]] = ..., prefill_ids: _Optional[_Iterable[int]] = ..., prefill_lens: _Optional[_Iterable[int]] = ..., verify_ids: _Optional[_Iterable[int]] = ..., base_lens: _Optional[_Iterable[int]] = ..., num_drafts: _Optional[_Iterable[int]] = ..., draft_token_ids: _Optional[bytes] = ..., draft_parents: _Optional[_Iterable[int]] = ..., colocated_draft_ids: _Optional[_Iterable[int]] = ..., colocated_num_drafts: _Optional[_Iterable[int]] = ..., tree_width: _Optional[int] = ..., num_draft_candidates: _Optional[_Iterable[int]] = ..., draft_candidate_ids: _Optional[_Iterable[int]] = ..., draft_log_probs: _Optional[_Iterable[float]] = ..., num_own_drafts: _Optional[_Iterable[int]] = ..., least_own_log_prob: _Optional[float] = ..., is_ahead: _Optional[bool] = ...) -> None: ...

class CloseSequences(_message.Message):
    __slots__ = ("sequence_ids",)
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step_id", "sequence_ids", "statuses", "committed_lens", "num_accepted_drafts", "num_tokens", "token_ids", "finish_reasons", "logprobs", "free_pages", "timings", "errors", "prompt_logprobs", "kv_lens", "cached_lens", "num_own_drafts", "own_log_probs", "own_parents", "accepted_drafts")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    KV_LENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_LENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OWN_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    OWN_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    OWN_PARENTS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    statuses: _containers.RepeatedScalarFieldContainer[EntryStatus]
    committed_lens: _containers.RepeatedScalarFieldContainer[int]
    num_accepted_drafts: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    token_ids: bytes
    finish_reasons: _containers.RepeatedScalarFieldContainer[_common_pb2.FinishReason]
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    free_pages: int
    timings: StepTimings
    errors: _containers.RepeatedScalarFieldContainer[str]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.PromptLogprobs]
    kv_lens: _containers.RepeatedScalarFieldContainer[int]
    cached_lens: _containers.RepeatedScalarFieldContainer[int]
    num_own_drafts: _containers.RepeatedScalarFieldContainer[int]
    own_log_probs: bytes
    own_parents: bytes
    accepted_drafts: bytes
    def __init__(self, step_id: _Optional[int] = ..., sequence_ids: _Optional[_Iterable[int]] = ..., statuses: _Optional[_Iterable[_Union[EntryStatus, str]]] = ..., committed_lens: _Optional[_Iterable[int]] = ..., num_accepted_drafts: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., token_ids: _Optional[bytes] = ..., finish_reasons: _Optional[_Iterable[_Union[_common_pb2.FinishReason, str]]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., free_pages: _Optional[int] = ..., timings: _Optional[_Union[StepTimings, _Mapping]] = ..., errors: _Optional[_Iterable[str]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.PromptLogprobs, _Mapping]]] = ..., kv_lens: _Optional[_Iterable[int]] = ..., cached_lens: _Optional[_Iterable[int]] = ..., num_own_drafts: _Optional[_Iterable[int]] = ..., own_log_probs: _Optional[bytes] = ..., own_parents: _Optional[bytes] = ..., accepted_drafts: _Optional[bytes] = ...) -> None: ...

class StepTimings(_message.Message):
    __slots__ = ("queue_ns", "forward_ns", "verify_ns", "draft_ns", "total_ns")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_NS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    forward_ns: int
    verify_ns: int
    draft_ns: int
    total_ns: int
    def __init__(self, queue_ns: _Optional[int] = ..., forward_ns: _Optional[int] = ..., verify_ns: _Optional[int] = ..., draft_ns: _Optional[int] = ..., total_ns: _Optional[int] = ...) -> None: ...

class FeaturesRequest(_message.Message):
    __slots__ = ("hello", "subscribe", "unsubscribe", "mapped")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBE_FIELD_NUMBER: _ClassVar[int]
    UNSUBSCRIBE_FIELD_NUMBER: _ClassVar[int]
    MAPPED_FIELD_NUMBER: _ClassVar[int]
    hello: FeaturesHello
    subscribe: Subscribe
    unsubscribe: Unsubscribe
    mapped: FeaturesMapped
    def __init__(self, hello: _Optional[_Union[FeaturesHello, _Mapping]] = ..., subscribe: _Optional[_Union[Subscribe, _Mapping]] = ..., unsubscribe: _Optional[_Union[Unsubscribe, _Mapping]] = ..., mapped: _Optional[_Union[FeaturesMapped, _Mapping]] = ...) -> None: ...

class FeaturesResponse(_message.Message):
    __slots__ = ("hello", "features", "end", "named")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NAMED_FIELD_NUMBER: _ClassVar[int]
    hello: FeaturesHelloReply
    features: ContextFeatures
    end: FeaturesEnd
    named: NamedFeatures
    def __init__(self, hello: _Optional[_Union[FeaturesHelloReply, _Mapping]] = ..., features: _Optional[_Union[ContextFeatures, _Mapping]] = ..., end: _Optional[_Union[FeaturesEnd, _Mapping]] = ..., named: _Optional[_Union[NamedFeatures, _Mapping]] = ...) -> None: ...

class FeaturesHello(_message.Message):
    __slots__ = ("protocol_version", "drafter_id", "fingerprint", "reads_shared_memory")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    READS_SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    drafter_id: str
    fingerprint: str
    reads_shared_memory: bool
    def __init__(self, protocol_version: _Optional[int] = ..., drafter_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., reads_shared_memory: _Optional[bool] = ...) -> None: ...

class FeaturesHelloReply(_message.Message):
    __slots__ = ("protocol_version", "target_id", "memory")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TARGET_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    target_id: str
    memory: FeatureMemory
    def __init__(self, protocol_version: _Optional[int] = ..., target_id: _Optional[str] = ..., memory: _Optional[_Union[FeatureMemory, _Mapping]] = ...) -> None: ...

class FeatureMemory(_message.Message):
    __slots__ = ("pid", "fd", "name", "num_pages", "page_size", "width", "dtype")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    name: str
    num_pages: int
    page_size: int
    width: int
    dtype: DataType
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., name: _Optional[str] = ..., num_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., width: _Optional[int] = ..., dtype: _Optional[_Union[DataType, str]] = ...) -> None: ...

class FeaturesMapped(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Subscribe(_message.Message):
    __slots__ = ("epoch", "step_id", "subscription_ids", "sequence_ids", "starts")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIPTION_IDS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    subscription_ids: _containers.RepeatedScalarFieldContainer[int]
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., subscription_ids: _Optional[_Iterable[int]] = ..., sequence_ids: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ...) -> None: ...

class Unsubscribe(_message.Message):
    __slots__ = ("subscription_ids",)
    SUBSCRIPTION_IDS_FIELD_NUMBER: _ClassVar[int]
    subscription_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, subscription_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ContextFeatures(_message.Message):
    __slots__ = ("subscription_ids", "starts", "num_rows", "dtype", "data")
    SUBSCRIPTION_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    subscription_ids: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    num_rows: _containers.RepeatedScalarFieldContainer[int]
    dtype: DataType
    data: bytes
    def __init__(self, subscription_ids: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., num_rows: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DataType, str]] = ..., data: _Optional[bytes] = ...) -> None: ...

class NamedFeatures(_message.Message):
    __slots__ = ("subscription_ids", "starts", "num_rows", "pages", "uses")
    SUBSCRIPTION_IDS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    subscription_ids: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    num_rows: _containers.RepeatedScalarFieldContainer[int]
    pages: _containers.RepeatedScalarFieldContainer[int]
    uses: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, subscription_ids: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., num_rows: _Optional[_Iterable[int]] = ..., pages: _Optional[_Iterable[int]] = ..., uses: _Optional[_Iterable[int]] = ...) -> None: ...

class FeaturesEnd(_message.Message):
    __slots__ = ("subscription_ids", "reasons")
    SUBSCRIPTION_IDS_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    subscription_ids: _containers.RepeatedScalarFieldContainer[int]
    reasons: _containers.RepeatedScalarFieldContainer[FeaturesEndReason]
    def __init__(self, subscription_ids: _Optional[_Iterable[int]] = ..., reasons: _Optional[_Iterable[_Union[FeaturesEndReason, str]]] = ...) -> None: ...
