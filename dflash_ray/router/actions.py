"""What the scheduler asks of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dflash_ray.core.arrays import Flags, Ids, Ints, Tokens
from dflash_ray.core.errors import RequestError
from dflash_ray.core.stats import DecodePass
from dflash_ray.pb import common_pb2, drafter_pb2, target_pb2
from dflash_ray.router.sequence import RouterSequence


@dataclass(frozen=True, slots=True)
class RunStep:
    """Send a step; those in flight are answered in their order."""

    step: target_pb2.Step
    num_rows: int


@dataclass(frozen=True, slots=True)
class CloseSequences:
    """Free sequences on the target at once."""

    sequence_ids: list[int]


@dataclass(frozen=True, slots=True)
class RequestDrafts:
    """Tell a drafter what to open and to draft; one request is in flight at a time for each."""

    drafter_id: str
    request: drafter_pb2.DraftRequest


@dataclass(frozen=True, slots=True)
class DropTarget:
    """End the stream of a target group that does not answer."""


@dataclass(frozen=True, slots=True)
class DropDrafter:
    """End the stream of a drafter that does not answer."""

    drafter_id: str


@dataclass(slots=True)
class Emit:
    """Give requests their new tokens; with a finish reason these are a request's last. Columns over the requests.

    Attributes:
        streams, call_ids: where each request came from.
        token_ids: num_tokens[i] of each, one after the other.
        is_decode_pass: False for what a prefill drew: then the three columns that follow say nothing.
        num_spec_tokens: the longest draft block asked for.
        logprobs: by request, for those who asked.
        prompt_logprobs: by request, without tokens.
        num_cached_tokens: known tokens whose rows were found computed, by request, of those that a prefill drew for.
    """

    sequence_ids: Ints
    streams: Ints
    call_ids: Ids
    num_tokens: Ints
    token_ids: Tokens
    finish_reasons: Ints
    is_decode_pass: Flags
    num_drafts: Ints
    num_accepted: Ints
    num_spec_tokens: Ints
    logprobs: dict[int, common_pb2.TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, common_pb2.PromptLogprobs] = field(default_factory=dict)
    num_cached_tokens: dict[int, int] = field(default_factory=dict)

    @classmethod
    def one(
        cls,
        sequence: RouterSequence,
        token_ids: Sequence[int] = (),
        finish_reason: common_pb2.FinishReason = common_pb2.FINISH_REASON_UNSPECIFIED,
        decode_pass: DecodePass | None = None,
        logprobs: common_pb2.TokenLogprobs | None = None,
        prompt_logprobs: common_pb2.PromptLogprobs | None = None,
        num_cached_tokens: int = 0,
    ) -> Emit:
        """For a single request."""
        num_drafts, num_accepted, num_spec_tokens = (np.array([value]) for value in decode_pass or (0, 0, 0))
        return cls(
            np.array([sequence.sequence_id]),
            np.array([sequence.stream]),
            np.array([sequence.call_id], np.uint64),
            np.array([len(token_ids)]),
            np.array(token_ids, np.uint32),
            np.array([finish_reason]),
            np.array([decode_pass is not None]),
            num_drafts,
            num_accepted,
            num_spec_tokens,
            {} if logprobs is None else {0: logprobs},
            {} if prompt_logprobs is None else {0: prompt_logprobs},
            {0: num_cached_tokens} if num_cached_tokens else {},
        )

    def by_stream(self) -> Iterator[tuple[int, Emit]]:
        """Each stream with what concerns its requests."""
        streams = set(self.streams.tolist())
        for stream in streams:
            yield stream, self if len(streams) == 1 else self.only(self.streams == stream)

    def ended(self) -> list[int]:
        """Calls that get no more."""
        if not np.count_nonzero(self.finish_reasons):
            return []
        ended: list[int] = self.call_ids[self.finish_reasons > 0].tolist()
        return ended

    def only(self, is_its: Flags) -> Emit:
        """What concerns these requests."""
        places = {int(i): place for place, i in enumerate(is_its.nonzero()[0])}
        return Emit(
            self.sequence_ids[is_its],
            self.streams[is_its],
            self.call_ids[is_its],
            self.num_tokens[is_its],
            self.token_ids[np.repeat(is_its, self.num_tokens)],
            self.finish_reasons[is_its],
            self.is_decode_pass[is_its],
            self.num_drafts[is_its],
            self.num_accepted[is_its],
            self.num_spec_tokens[is_its],
            {places[i]: part for i, part in self.logprobs.items() if i in places},
            {places[i]: part for i, part in self.prompt_logprobs.items() if i in places},
            {places[i]: count for i, count in self.num_cached_tokens.items() if i in places},
        )

    def entries(self) -> Iterator[tuple[int, list[int], int]]:
        """Each request's sequence id with its tokens and finish reason."""
        ends = self.num_tokens.cumsum()
        columns = (self.sequence_ids, ends - self.num_tokens, ends, self.finish_reasons)
        for sequence_id, start, end, reason in zip(*(column.tolist() for column in columns), strict=True):
            yield sequence_id, self.token_ids[start:end].tolist(), reason


@dataclass(frozen=True, slots=True)
class Fail:
    """End a request with an error."""

    sequence: RouterSequence
    error: RequestError


Action = RunStep | CloseSequences | RequestDrafts | DropTarget | DropDrafter | Emit | Fail
