"""Whether a step and the sequences that it opens are well-formed, before anything of them is used.

The one place on the target's side where values and columns are checked. What depends on the state of a sequence, the
engine decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dflash_ray.sampling.parameters import SamplingParams
from dflash_ray.target_group.step import Ints, Opening, StepInput, chain_parents

_MAX_LOGPROBS = 1024
_MAX_SALT_BYTES = 64
_MAX_DRAWN_PROB = 1.001  # rounding may leave the log-probability of a certain draft above 0


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a group takes: rows of a step, tokens of a sequence, tokens of the model."""

    max_batch_tokens: int
    max_model_len: int
    vocab_size: int


def check_step(step: StepInput, limits: StepLimits) -> None:
    """Raises ValueError that names the columns which do not belong together.

    What is wrong with one sequence alone is noted in the step: its entries will fail and their neighbours go on.
    """
    drafts, num_verify = step.drafts, len(step.verify_ids)
    num_drafts = num_rows = int(drafts.counts.sum())
    _check_length("prefill_lens", step.prefill_lens, len(step.prefill_ids))
    _check_length("base_lens", step.base_lens, num_verify)
    _check_length("num_drafts", drafts.counts, num_verify)
    _check_length("draft_token_ids", drafts.token_ids, num_drafts)
    _check_length("colocated_num_drafts", step.draft_counts, len(step.draft_ids))
    if len(step.own_counts):
        _check_length("num_own_drafts", step.own_counts, num_verify)
        num_rows += int(step.own_counts.sum())
    if len(drafts.parents):
        _check_length("draft_parents", drafts.parents, num_drafts)
    if len(drafts.num_candidates):
        _check_length("num_draft_candidates", drafts.num_candidates, num_verify)
        num_candidates = int((drafts.counts * drafts.num_candidates).sum())
        _check_length("draft_candidate_ids", drafts.candidate_ids, num_candidates)
        _check_length("draft_log_probs", drafts.candidate_probs, num_candidates)
    if len(step.prefill_lens):
        if np.count_nonzero(step.prefill_lens < 1):
            raise ValueError("step: prefill_lens must be at least 1")
        num_rows += int(step.prefill_lens.sum())
    if len(step.own_counts) and num_drafts and np.count_nonzero((step.own_counts > 0) & (drafts.counts > 0)):
        raise ValueError("step: an entry has either num_drafts or num_own_drafts")
    if not step.least_own_log_prob <= 0:
        raise ValueError("step: least_own_log_prob must be at most 0")
    num_rows += num_verify
    if num_rows > limits.max_batch_tokens:
        raise ValueError(f"step: {num_rows} rows are more than the group's max_batch_tokens, {limits.max_batch_tokens}")
    for index, opening in enumerate(step.open):
        if fault := _fault_of_opening(opening, limits):
            step.faults_of_open[index] = fault
    if num_drafts:
        _note_faults_of_drafts(step, limits.vocab_size)


def _check_length(name: str, column: np.ndarray, length: int) -> None:
    if len(column) != length:
        raise ValueError(f"step: {name} has {len(column)} elements where {length} belong")


def _note_faults_of_drafts(step: StepInput, vocab_size: int) -> None:
    """By entry; of several faults the first one counts."""
    drafts = step.drafts
    is_tree = len(drafts.parents) > 0
    if not is_tree and not len(drafts.candidate_ids) and drafts.token_ids.max(initial=0) < vocab_size:
        return
    entry_of = np.repeat(np.arange(len(drafts.counts)), drafts.counts)

    def note(is_wrong: np.ndarray, entries: Ints, fault: str) -> None:
        for entry in np.unique(entries[is_wrong]).tolist():
            step.faults_of_drafts.setdefault(entry, fault)

    follows = chain_parents(drafts.counts)
    parents = drafts.parents if is_tree else follows
    note((parents < 0) | (parents > follows), entry_of, "a draft's parent must come before it in its entry")
    note(drafts.token_ids >= vocab_size, entry_of, f"drafts must be below {vocab_size}")
    if not len(drafts.candidate_ids):
        return
    candidates_of_node = drafts.num_candidates[entry_of]
    is_drawn = candidates_of_node > 0
    note(is_drawn & (parents != follows), entry_of, "drafts that were drawn must be a chain")
    places = (np.cumsum(candidates_of_node) - candidates_of_node)[is_drawn]
    is_other = drafts.candidate_ids[places] != drafts.token_ids[is_drawn]
    note(is_other, entry_of[is_drawn], "the first candidate of a draft must be the draft")
    # A NaN is not at most anything.
    is_impossible = ~(drafts.candidate_probs <= _MAX_DRAWN_PROB)
    note(is_impossible, np.repeat(entry_of, candidates_of_node), "draft_log_probs must be at most 0")


def _fault_of_opening(opening: Opening, limits: StepLimits) -> str:
    """Names the value with which the sequence cannot run; empty when there is none."""
    length = len(opening.token_ids)
    if not 0 < opening.prompt_len <= length <= limits.max_model_len:
        return f"{length} tokens with prompt_len {opening.prompt_len} of at most {limits.max_model_len}"
    ids = {"token_ids": opening.token_ids, "bias_token_ids": opening.sampling.bias_ids}
    for name, values in ids.items():
        if values.max(initial=0) >= limits.vocab_size:
            return f"{name} must be below {limits.vocab_size}"
    if len(opening.cache_salt) > _MAX_SALT_BYTES:
        return f"cache_salt has {len(opening.cache_salt)} bytes of at most {_MAX_SALT_BYTES}"
    return _fault_of_sampling(opening.sampling)


def _fault_of_sampling(sampling: SamplingParams) -> str:
    if len(sampling.bias_ids) != len(sampling.bias_values):
        return "bias_values must be as many as bias_token_ids"
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
            return f"{name} is {value}; it must be a number between {low:g} and {high:g}"
    if not sampling.repetition_penalty:
        return "repetition_penalty must be above 0; 1 is off"
    if not np.isfinite(sampling.bias_values).all():
        return "bias_values must be finite numbers"
    for name in ("num_logprobs", "num_prompt_logprobs"):
        if getattr(sampling, name) > _MAX_LOGPROBS:
            return f"{name} must be at most {_MAX_LOGPROBS}"
    return ""
