"""What the scheduler asks of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_ray.core.errors import RequestError
from dflash_ray.core.stats import DecodePass
from dflash_ray.pb import common_pb2, drafter_pb2, target_pb2
from dflash_ray.router.sequence import RouterSequence


@dataclass(frozen=True, slots=True)
class RunStep:
    """Send a step; one is in flight at a time."""

    step: target_pb2.Step


@dataclass(frozen=True, slots=True)
class CloseSequences:
    """Free sequences on the target at once."""

    sequence_ids: list[int]


@dataclass(frozen=True, slots=True)
class Replay:
    """Ask the target for one piece of context features again, from row `start` on."""

    sequence_id: int
    start: int


@dataclass(frozen=True, slots=True)
class RequestDrafts:
    """Send contexts and proposals to a drafter; one request is in flight at a time for each."""

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
    """Give a request its new tokens; with a finish reason these are the last.

    Attributes:
        decode_pass: how the pass took its drafts; None for what the prefill drew.
        prompt_logprobs: of the prompt, without tokens.
    """

    sequence: RouterSequence
    token_ids: list[int]
    logprobs: common_pb2.TokenLogprobs | None
    finish_reason: common_pb2.FinishReason
    decode_pass: DecodePass | None = None
    prompt_logprobs: common_pb2.PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Fail:
    """End a request with an error."""

    sequence: RouterSequence
    error: RequestError


Action = RunStep | CloseSequences | Replay | RequestDrafts | DropTarget | DropDrafter | Emit | Fail
