"""Steps and their results between the wire's messages and the engine's arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dflash_ray.core.arrays import column, packed, unpacked
from dflash_ray.pb import common_pb2, target_pb2
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.parameters import COUPLED, NO_LOGPROBS, REJECTION, SamplingParams
from dflash_ray.target_group.step import Drafts, Ids, Ints, Opening, StepInput, StepOutput, no_floats, no_ids, no_ints

_MODES = {common_pb2.VERIFY_MODE_REJECTION: REJECTION}


def to_ids(values: Sequence[int]) -> Ids:
    """A column of sequence ids."""
    return column(values, np.uint64) if values else no_ids()


def decode_step(step: target_pb2.Step) -> StepInput:
    """A step as it was sent, not checked yet. Raises ValueError for bytes that are no column."""
    probs = no_floats()
    if step.draft_log_probs:
        with np.errstate(over="ignore"):  # what is no log-probability is refused as a probability
            probs = np.exp(np.array(step.draft_log_probs, dtype=np.float64)).astype(np.float32)
    return StepInput(
        step_id=step.step_id,
        close=to_ids(step.close),
        open=[_decode_opening(message) for message in step.open],
        prefill_ids=to_ids(step.prefill_ids),
        prefill_lens=_ints(step.prefill_lens),
        verify_ids=to_ids(step.verify_ids),
        base_lens=_ints(step.base_lens),
        is_ahead=step.is_ahead,
        own_counts=_ints(step.num_own_drafts),
        least_own_log_prob=step.least_own_log_prob,
        drafts=Drafts(
            counts=_ints(step.num_drafts),
            token_ids=unpacked("step: draft_token_ids", step.draft_token_ids).astype(np.int64)
            if step.draft_token_ids
            else no_ints(),
            parents=_ints(step.draft_parents),
            num_candidates=_ints(step.num_draft_candidates),
            candidate_ids=_ints(step.draft_candidate_ids),
            candidate_probs=probs,
        ),
        draft_ids=to_ids(step.colocated_draft_ids),
        draft_counts=_ints(step.colocated_num_drafts),
        tree_width=max(1, step.tree_width),
    )


def _ints(values: Sequence[int]) -> Ints:
    return column(values) if values else no_ints()


def _decode_opening(message: target_pb2.OpenSequence) -> Opening:
    sampling = message.sampling
    has_logprobs, has_prompt_logprobs = (sampling.HasField(name) for name in ("num_logprobs", "num_prompt_logprobs"))
    return Opening(
        sequence_id=message.sequence_id,
        token_ids=_ints(message.token_ids),
        prompt_len=message.prompt_len,
        max_new_tokens=message.stopping.max_new_tokens,
        min_new_tokens=message.stopping.min_new_tokens,
        stop_ids=_ints(message.stopping.stop_token_ids),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            mode=_MODES.get(sampling.mode, COUPLED),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            num_logprobs=sampling.num_logprobs if has_logprobs else NO_LOGPROBS,
            num_prompt_logprobs=sampling.num_prompt_logprobs if has_prompt_logprobs else NO_LOGPROBS,
            bias_ids=_ints(sampling.bias_token_ids),
            bias_values=np.array(sampling.bias_values, dtype=np.float32),
        ),
        wants_features=message.wants_features,
        cache_salt=message.cache_salt,
    )


def encode_result(output: StepOutput) -> target_pb2.StepResult:
    """The result of a step."""
    result = target_pb2.StepResult(
        step_id=output.step_id,
        sequence_ids=output.sequence_ids.tolist(),
        statuses=output.statuses.tolist(),
        committed_lens=output.committed_lens.tolist(),
        num_tokens=output.num_tokens.tolist(),
        token_ids=packed(output.token_ids),
        free_pages=output.free_pages,
        timings=target_pb2.StepTimings(
            forward_ns=output.forward_ns, verify_ns=output.verify_ns, draft_ns=output.draft_ns
        ),
        errors=output.errors,
        kv_lens=output.kv_lens.tolist(),
        cached_lens=output.cached_lens.tolist(),
    )
    if np.count_nonzero(output.num_accepted):
        result.num_accepted_drafts.extend(output.num_accepted.tolist())
    if np.count_nonzero(output.finishes):
        result.finish_reasons.extend(output.finishes.tolist())
    if len(output.own_counts):
        result.num_own_drafts.extend(output.own_counts.tolist())
        result.own_log_probs = output.own_log_probs.astype("<f4", copy=False).tobytes()
        result.own_parents = packed(output.own_parents)
    if len(output.accepted_drafts):
        result.accepted_drafts = packed(output.accepted_drafts)
    if output.logprobs:
        result.logprobs.extend(map(_encode_logprobs, output.logprobs))
    for part in output.prompt_logprobs:
        result.prompt_logprobs.add(
            sequence_id=part.sequence_id, start=part.start, logprobs=_encode_logprobs(part.logprobs)
        )
    return result


def _encode_logprobs(logprobs: Logprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        chosen=logprobs.chosen.tolist(),
        num_top=logprobs.top_ids.shape[1],
        top_token_ids=logprobs.top_ids.ravel().tolist(),
        top_logprobs=logprobs.top_logprobs.ravel().tolist(),
    )
