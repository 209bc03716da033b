"""Whether a step and the sequences that it opens are well-formed, before anything of them is used."""

from __future__ import annotations

import math

from dflash_ray.pb import common_pb2, target_pb2

_MAX_LOGPROBS = 1024


def check_step(step: target_pb2.Step, max_batch_tokens: int) -> None:
    """Raises ValueError that names the columns which do not belong together."""
    num_chains, num_drafts = len(step.verify_ids), sum(step.num_drafts)
    wanted = {
        "prefill_lens": len(step.prefill_ids),
        "base_lens": num_chains,
        "num_drafts": num_chains,
        "draft_token_ids": num_drafts,
        "draft_parents": num_drafts,
        "colocated_num_drafts": len(step.colocated_draft_ids),
    }
    if step.num_draft_candidates:
        num_candidates = sum(a * b for a, b in zip(step.num_drafts, step.num_draft_candidates, strict=False))
        wanted |= {
            "num_draft_candidates": num_chains,
            "draft_candidate_ids": num_candidates,
            "draft_log_probs": num_candidates,
        }
    for name, length in wanted.items():
        if len(getattr(step, name)) != length:
            raise ValueError(f"step: {name} has {len(getattr(step, name))} elements where {length} belong")
    if 0 in step.prefill_lens:
        raise ValueError("step: prefill_lens must be at least 1")
    rows = sum(step.prefill_lens) + num_chains + num_drafts
    if rows > max_batch_tokens:
        raise ValueError(f"step: {rows} rows are more than the group's max_batch_tokens, {max_batch_tokens}")


def check_sequence(message: target_pb2.OpenSequence, max_model_len: int, vocab_size: int) -> None:
    """Raises ValueError that names the value with which a sequence cannot run."""
    length = len(message.token_ids)
    if not 0 < message.prompt_len <= length <= max_model_len:
        raise ValueError(f"{length} tokens with prompt_len {message.prompt_len} of at most {max_model_len}")
    ids = {"token_ids": message.token_ids, "bias_token_ids": message.sampling.bias_token_ids}
    for name, values in ids.items():
        if max(values, default=0) >= vocab_size:
            raise ValueError(f"{name} must be below {vocab_size}")
    _check_sampling(message.sampling)


def _check_sampling(sampling: common_pb2.SamplingParams) -> None:
    if len(sampling.bias_token_ids) != len(sampling.bias_values):
        raise ValueError("bias_values must be as many as bias_token_ids")
    ranges = {
        "temperature": (0.0, math.inf),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "presence_penalty": (-math.inf, math.inf),
        "frequency_penalty": (-math.inf, math.inf),
        "repetition_penalty": (0.0, math.inf),
    }
    for name, (low, high) in ranges.items():
        value = getattr(sampling, name)
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{name} is {value}; it must be a number between {low:g} and {high:g}")
    if not sampling.repetition_penalty:
        raise ValueError("repetition_penalty must be above 0; 1 is off")
    if not all(map(math.isfinite, sampling.bias_values)):
        raise ValueError("bias_values must be finite numbers")
    for name in ("num_logprobs", "num_prompt_logprobs"):
        if getattr(sampling, name) > _MAX_LOGPROBS:
            raise ValueError(f"{name} must be at most {_MAX_LOGPROBS}")
