from dflash_ray.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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
    __slots__ = ("request_id", "close", "contexts", "sequence_ids", "epochs", "committed_lens", "anchor_token_ids", "num_draft_tokens", "num_candidates", "temperatures", "seeds", "wants_distributions")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LENS_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    WANTS_DISTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    close: _containers.RepeatedScalarFieldContainer[int]
    contexts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ContextFeatures]
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    epochs: _containers.RepeatedScalarFieldContainer[int]
    committed_lens: _containers.RepeatedScalarFieldContainer[int]
    anchor_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_draft_tokens: _containers.RepeatedScalarFieldContainer[int]
    num_candidates: int
    temperatures: _containers.RepeatedScalarFieldContainer[float]
    seeds: _containers.RepeatedScalarFieldContainer[int]
    wants_distributions: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, request_id: _Optional[int] = ..., close: _Optional[_Iterable[int]] = ..., contexts: _Optional[_Iterable[_Union[_common_pb2.ContextFeatures, _Mapping]]] = ..., sequence_ids: _Optional[_Iterable[int]] = ..., epochs: _Optional[_Iterable[int]] = ..., committed_lens: _Optional[_Iterable[int]] = ..., anchor_token_ids: _Optional[_Iterable[int]] = ..., num_draft_tokens: _Optional[_Iterable[int]] = ..., num_candidates: _Optional[int] = ..., temperatures: _Optional[_Iterable[float]] = ..., seeds: _Optional[_Iterable[int]] = ..., wants_distributions: _Optional[_Iterable[bool]] = ...) -> None: ...

class MissingContext(_message.Message):
    __slots__ = ("sequence_id", "have_len", "is_refused")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    HAVE_LEN_FIELD_NUMBER: _ClassVar[int]
    IS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    have_len: int
    is_refused: bool
    def __init__(self, sequence_id: _Optional[int] = ..., have_len: _Optional[int] = ..., is_refused: _Optional[bool] = ...) -> None: ...

class DraftReply(_message.Message):
    __slots__ = ("request_id", "blocks", "missing", "queue_ns", "draft_ns")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    blocks: _containers.RepeatedCompositeFieldContainer[_common_pb2.DraftBlock]
    missing: _containers.RepeatedCompositeFieldContainer[MissingContext]
    queue_ns: int
    draft_ns: int
    def __init__(self, request_id: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[_common_pb2.DraftBlock, _Mapping]]] = ..., missing: _Optional[_Iterable[_Union[MissingContext, _Mapping]]] = ..., queue_ns: _Optional[int] = ..., draft_ns: _Optional[int] = ...) -> None: ...
