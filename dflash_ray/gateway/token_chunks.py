"""What routers say of calls, entry by entry of their messages' columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dflash_ray.core.errors import RequestError, error_of_call
from dflash_ray.core.stats import DecodePass
from dflash_ray.pb import common_pb2, router_pb2


@dataclass(slots=True)
class TokenChunk:
    """What one target pass committed for a call. A call's first chunk is empty and names the model.

    Attributes:
        finish_reason: on the last chunk.
        decode_pass: None for what the prefill drew.
        prompt_logprobs: in a chunk without tokens, before all tokens.
        num_cached_tokens: known tokens whose rows the target found computed, with the first ones that it drew.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: common_pb2.FinishReason = common_pb2.FINISH_REASON_UNSPECIFIED
    decode_pass: DecodePass | None = None
    model_fingerprint: str = ""
    logprobs: common_pb2.TokenLogprobs | None = None
    prompt_logprobs: common_pb2.PromptLogprobs | None = None
    num_cached_tokens: int = 0


def unpack(progress: router_pb2.Progress) -> Iterator[tuple[int, TokenChunk | RequestError]]:
    """Call ids and what is said of them. Raises ValueError where columns do not fit together."""
    token_ids = memoryview(progress.token_ids).cast("I").tolist()
    if sum(progress.num_tokens) != len(token_ids):
        raise ValueError("num_tokens does not add up to the number of token_ids")
    extras = {extra.entry: extra for extra in progress.extras}
    columns = zip(
        progress.call_ids,
        progress.num_tokens,
        progress.finish_reasons,
        progress.is_decode_pass,
        progress.num_drafts,
        progress.num_accepted_drafts,
        progress.num_spec_tokens,
        strict=True,
    )
    end = 0
    for entry, (call_id, count, reason, is_decode_pass, num_drafts, num_accepted, num_spec) in enumerate(columns):
        start, end = end, end + count
        decode_pass = DecodePass(num_drafts, num_accepted, num_spec) if is_decode_pass else None
        chunk = TokenChunk(token_ids[start:end], reason, decode_pass)
        yield call_id, _with_extras(chunk, extras[entry]) if entry in extras else chunk


def _with_extras(chunk: TokenChunk, extra: router_pb2.EntryExtras) -> TokenChunk | RequestError:
    if extra.HasField("error"):
        error = extra.error
        return error_of_call(error.code, error.message, error.field or None, error.num_losses)
    chunk.model_fingerprint = extra.model_fingerprint
    chunk.logprobs = extra.logprobs if extra.HasField("logprobs") else None
    chunk.prompt_logprobs = extra.prompt_logprobs if extra.HasField("prompt_logprobs") else None
    chunk.num_cached_tokens = extra.num_cached_tokens
    return chunk
