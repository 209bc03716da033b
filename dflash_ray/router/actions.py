"""What the scheduler asks of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dflash_ray.core.arrays import Flags, Ints, Tokens
from dflash_ray.core.errors import RequestError
from dflash_ray.pb import common_pb2, drafter_pb2, target_pb2
from dflash_ray.router.sequence import RouterSequence


@dataclass(frozen=True, slots=True)
class RunStep:
    """Send a step; those in flight are answered in their order."""

    step: target_pb2.Step


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


@dataclass(frozen=True, slots=True)
class Emit:
    """Give requests their new tokens; with a finish reason these are a request's last. Columns over the requests.

    Attributes:
        token_ids: num_tokens[i] of each, one after the other.
        is_decode_pass: False for what a prefill drew: then the three columns that follow say nothing.
        num_spec_tokens: the longest draft block asked for.
        logprobs: by request, for those who asked.
        prompt_logprobs: by request, without tokens.
    """

    sequences: list[RouterSequence]
    num_tokens: Ints
    token_ids: Tokens
    finish_reasons: Ints
    is_decode_pass: Flags
    num_drafts: Ints
    num_accepted: Ints
    num_spec_tokens: Ints
    logprobs: dict[int, common_pb2.TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, common_pb2.PromptLogprobs] = field(default_factory=dict)

    @classmethod
    def without_tokens(
        cls,
        sequence: RouterSequence,
        finish_reason: common_pb2.FinishReason = common_pb2.FINISH_REASON_UNSPECIFIED,
        prompt_logprobs: common_pb2.PromptLogprobs | None = None,
    ) -> Emit:
        """Something else that a request is to be told."""
        none = np.zeros(1, np.int64)
        by_request = {} if prompt_logprobs is None else {0: prompt_logprobs}
        no_tokens = np.zeros(0, np.uint32)
        reasons = np.array([finish_reason])
        is_decode_pass = np.zeros(1, np.bool_)
        return cls([sequence], none, no_tokens, reasons, is_decode_pass, none, none, none, {}, by_request)

    def entries(self) -> Iterator[tuple[RouterSequence, list[int], common_pb2.FinishReason]]:
        """Each request with its tokens and finish reason."""
        ends = np.cumsum(self.num_tokens)
        starts = ends - self.num_tokens
        columns = (starts.tolist(), ends.tolist(), self.finish_reasons.tolist())
        for sequence, start, end, reason in zip(self.sequences, *columns, strict=True):
            yield sequence, self.token_ids[start:end].tolist(), reason


@dataclass(frozen=True, slots=True)
class Fail:
    """End a request with an error."""

    sequence: RouterSequence
    error: RequestError


Action = RunStep | CloseSequences | RequestDrafts | DropTarget | DropDrafter | Emit | Fail
