from dflash_ray.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MissingReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISSING_REASON_UNSPECIFIED: _ClassVar[MissingReason]
    MISSING_REASON_COMING: _ClassVar[MissingReason]
    MISSING_REASON_LOST: _ClassVar[MissingReason]
    MISSING_REASON_REFUSED: _ClassVar[MissingReason]
    MISSING_REASON_PASSED: _ClassVar[MissingReason]
MISSING_REASON_UNSPECIFIED: MissingReason
MISSING_REASON_COMING: MissingReason
MISSING_REASON_LOST: MissingReason
MISSING_REASON_REFUSED: MissingReason
MISSING_REASON_PASSED: MissingReason

class DrafterRequest(_message.Message):
    __slots__ = ("hello", "draft")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    hello: DrafterHello
    draft: DraftRequest
    def __init__(self, hello: _Optional[_Union[DrafterHello, _Mapping]] = ..., draft: _Optional[_Union[DraftRequest, _Mapping]] = ...) -> None: ...

class DrafterResponse(_message.Message):
    __slots__ = ("hello", "drafts")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    hello: DrafterHelloReply
    drafts: DraftReply
    def __init__(self, hello: _Optional[_Union[DrafterHelloReply, _Mapping]] = ..., drafts: _Optional[_Union[DraftReply, _Mapping]] = ...) -> None: ...

class DrafterHello(_message.Message):
    __slots__ = ("protocol_version", "router_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    router_id: str
    def __init__(self, protocol_version: _Optional[int] = ..., router_id: _Optional[str] = ...) -> None: ...

class DrafterHelloReply(_message.Message):
    __slots__ = ("protocol_version", "drafter_id", "method", "fingerprint", "max_draft_tokens", "needs_features")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_ID_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FEATURES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    drafter_id: str
    method: str
    fingerprint: str
    max_draft_tokens: int
    needs_features: bool
    def __init__(self, protocol_version: _Optional[int] = ..., drafter_id: _Optional[str] = ..., method: _Optional[str] = ..., fingerprint: _Optional[str] = ..., max_draft_tokens: _Optional[int] = ..., needs_features: _Optional[bool] = ...) -> None: ...

class DraftRequest(_message.Message):
    __slots__ = ("request_id", "epoch", "close", "source", "open", "open_lens", "token_sequence_ids", "token_starts", "num_tokens", "token_ids", "max_wait_ms", "tree_width", "sequence_ids", "committed_lens", "anchor_token_ids", "num_draft_tokens", "temperatures", "seeds", "wants_distributions")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    OPEN_LENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STARTS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    TREE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LENS_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    WANTS_DISTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    epoch: int
    close: _containers.RepeatedScalarFieldContainer[int]
    source: FeatureSource
    open: _containers.RepeatedScalarFieldContainer[int]
    open_lens: _containers.RepeatedScalarFieldContainer[int]
    token_sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    token_starts: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_wait_ms: int
    tree_width: int
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    committed_lens: _containers.RepeatedScalarFieldContainer[int]
    anchor_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_draft_tokens: _containers.RepeatedScalarFieldContainer[int]
    temperatures: _containers.RepeatedScalarFieldContainer[float]
    seeds: _containers.RepeatedScalarFieldContainer[int]
    wants_distributions: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, request_id: _Optional[int] = ..., epoch: _Optional[int] = ..., close: _Optional[_Iterable[int]] = ..., source: _Optional[_Union[FeatureSource, _Mapping]] = ..., open: _Optional[_Iterable[int]] = ..., open_lens: _Optional[_Iterable[int]] = ..., token_sequence_ids: _Optional[_Iterable[int]] = ..., token_starts: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., max_wait_ms: _Optional[int] = ..., tree_width: _Optional[int] = ..., sequence_ids: _Optional[_Iterable[int]] = ..., committed_lens: _Optional[_Iterable[int]] = ..., anchor_token_ids: _Optional[_Iterable[int]] = ..., num_draft_tokens: _Optional[_Iterable[int]] = ..., temperatures: _Optional[_Iterable[float]] = ..., seeds: _Optional[_Iterable[int]] = ..., wants_distributions: _Optional[_Iterable[bool]] = ...) -> None: ...

class FeatureSource(_message.Message):
    __slots__ = ("address", "step_id")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    address: str
    step_id: int
    def __init__(self, address: _Optional[str] = ..., step_id: _Optional[int] = ...) -> None: ...

class DraftReply(_message.Message):
    __slots__ = ("request_id", "blocks", "missing_ids", "have_lens", "missing_reasons", "queue_ns", "draft_ns")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISSING_IDS_FIELD_NUMBER: _ClassVar[int]
    HAVE_LENS_FIELD_NUMBER: _ClassVar[int]
    MISSING_REASONS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    blocks: _common_pb2.DraftBlocks
    missing_ids: _containers.RepeatedScalarFieldContainer[int]
    have_lens: _containers.RepeatedScalarFieldContainer[int]
    missing_reasons: _containers.RepeatedScalarFieldContainer[MissingReason]
    queue_ns: int
    draft_ns: int
    def __init__(self, request_id: _Optional[int] = ..., blocks: _Optional[_Union[_common_pb2.DraftBlocks, _Mapping]] = ..., missing_ids: _Optional[_Iterable[int]] = ..., have_lens: _Optional[_Iterable[int]] = ..., missing_reasons: _Optional[_Iterable[_Union[MissingReason, str]]] = ..., queue_ns: _Optional[int] = ..., draft_ns: _Optional[int] = ...) -> None: ...
