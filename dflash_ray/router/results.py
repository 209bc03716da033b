"""A target's result as arrays, checked against the step that it is for. Sans-IO, a part of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dflash_ray.core.arrays import Flags, Ints, Tokens, column, spans, unpacked
from dflash_ray.pb import common_pb2, target_pb2
from dflash_ray.router.steps import StepInFlight

_OK = target_pb2.ENTRY_STATUS_OK
_LOG_PROBS = np.dtype("<f4")
_NO_LOG_PROBS = np.zeros(0, np.float32)
_NO_INTS: Ints = np.zeros(0, np.int64)


@dataclass(slots=True)
class StepOutcome:
    """Columns over the entries of a step, in its order.

    Attributes:
        is_ok: entries that did what they were to do.
        token_ids: what each entry committed, one after the other.
        logprobs: of entries that asked and got tokens.
        errors: of entries that FAILED.
        num_drafts: that were to be verified; of own drafts, as many as there were.
        own_log_probs: of own drafts, one entry after the other.
        own_parents: as in the contract; None where all own drafts are chains.
        accepted_drafts: places of the accepted drafts in their entries, one after the other; None where all are chains.
        kv_lens, cached_lens: of prompts' chunks, rows that the target has and those that it found computed.
    """

    statuses: Ints
    is_ok: Flags
    num_accepted: Ints
    num_tokens: Ints
    token_ids: Tokens
    finish_reasons: Ints
    logprobs: dict[int, common_pb2.TokenLogprobs]
    errors: dict[int, str]
    kv_lens: Ints
    cached_lens: Ints
    num_drafts: Ints
    own_log_probs: npt.NDArray[np.float32]
    own_parents: Tokens | None
    accepted_drafts: Tokens | None

    def tokens_of(self, entries: Ints) -> Tokens:
        """What these entries committed; `entries` is rising."""
        if len(entries) == len(self.num_tokens):
            return self.token_ids
        counts = self.num_tokens[entries]
        starts = self.num_tokens.cumsum()[entries] - counts
        return self.token_ids[spans(starts, counts)]


def read_result(result: target_pb2.StepResult, step: StepInFlight) -> StepOutcome:
    """Raises ValueError when the result is not about the step's entries, or its columns do not belong together."""
    if result.sequence_ids != step.ids.tolist():
        raise ValueError(f"the result of step {step.step_id} has other entries than the step")
    num_entries = len(step.ids)
    statuses = _column("statuses", result.statuses, num_entries)
    num_tokens = _column("num_tokens", result.num_tokens, num_entries)
    finish_reasons = num_accepted = np.zeros(num_entries, np.int64)
    if result.finish_reasons:
        finish_reasons = _column("finish_reasons", result.finish_reasons, num_entries)
    if result.num_accepted_drafts:
        num_accepted = _column("num_accepted_drafts", result.num_accepted_drafts, num_entries)
    kv_lens = cached_lens = _NO_INTS
    if step.num_chunks or result.kv_lens or result.cached_lens:
        kv_lens, cached_lens = column(result.kv_lens), column(result.cached_lens)
    if not len(kv_lens) == len(cached_lens) == step.num_chunks:
        raise ValueError(f"kv_lens and cached_lens must have {step.num_chunks} elements, one a prefill entry")
    token_ids = unpacked("token_ids", result.token_ids)
    if int(num_tokens.sum()) != len(token_ids):
        raise ValueError(f"token_ids has {len(token_ids)} elements for {int(num_tokens.sum())} tokens")
    logprobs, errors = {}, {}
    if step.asks_logprobs is not None:
        with_logprobs = (step.asks_logprobs & (num_tokens > 0)).nonzero()[0].tolist()
        logprobs = dict(zip(with_logprobs, result.logprobs, strict=True))
    is_ok = statuses == _OK
    if np.count_nonzero(is_ok) < num_entries:
        failed = (statuses == target_pb2.ENTRY_STATUS_FAILED).nonzero()[0].tolist()
        errors = dict(zip(failed, result.errors, strict=True))
    return StepOutcome(
        statuses,
        is_ok,
        num_accepted,
        num_tokens,
        token_ids,
        finish_reasons,
        logprobs,
        errors,
        kv_lens,
        cached_lens,
        *_read_drafts(result, step, num_accepted),
    )


def _column(name: str, field: Sequence[int], num_entries: int) -> Ints:
    """A column over all entries."""
    if len(field) != num_entries:
        raise ValueError(f"{name} has {len(field)} elements for {num_entries} entries")
    return column(field)


def _read_drafts(
    result: target_pb2.StepResult, step: StepInFlight, num_accepted: Ints
) -> tuple[Ints, npt.NDArray[np.float32], Tokens | None, Tokens | None]:
    """The outcome's columns from num_drafts on."""
    num_drafts = step.num_drafts
    if not step.num_rows_of_drafts:
        return num_drafts, _NO_LOG_PROBS, None, None
    log_probs = np.frombuffer(result.own_log_probs, dtype=_LOG_PROBS)
    if np.count_nonzero(step.is_own):
        own = column(result.num_own_drafts)
        if len(own) != len(step.ids) - step.num_chunks:
            raise ValueError(f"num_own_drafts has {len(own)} elements, not one a verify entry")
        if step.num_chunks:
            own = np.concatenate((np.zeros(step.num_chunks, np.int64), own))
        num_drafts = np.where(step.is_own, own, num_drafts)
        if np.count_nonzero(num_drafts > step.num_drafts) or len(log_probs) != int(num_drafts[step.is_own].sum()):
            raise ValueError("num_own_drafts and own_log_probs are not about the drafts that were asked for")
    parents, accepted = (
        unpacked(name, data) if data else None
        for name, data in (("own_parents", result.own_parents), ("accepted_drafts", result.accepted_drafts))
    )
    if parents is not None and len(parents) != len(log_probs):
        raise ValueError(f"own_parents has {len(parents)} elements for {len(log_probs)} drafts")
    if accepted is not None and len(accepted) != int(num_accepted[step.num_chunks :].sum()):
        raise ValueError(f"accepted_drafts has {len(accepted)} elements, not one for each that was accepted")
    return num_drafts, log_probs, parents, accepted
