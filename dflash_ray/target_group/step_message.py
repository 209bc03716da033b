"""A step as one flat array, by which the rank that leads a group tells the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core.packing import pack_arrays, unpack_arrays
from dflash_ray.sampling.parameters import SamplingParams
from dflash_ray.target_group.step import Drafts, Ints, Opening, StepInput

_FAULT = "the rank that leads says why"
_STEP = {"close": np.uint64, "prefill_ids": np.uint64, "prefill_lens": np.int64, "verify_ids": np.uint64,
         "base_lens": np.int64}  # fmt: skip
_DRAFTS = {"counts": np.int64, "token_ids": np.int64, "parents": np.int64, "num_candidates": np.int64,
           "candidate_ids": np.int64, "candidate_probs": np.float32}  # fmt: skip
_FAULTS = ("faults_of_open", "faults_of_drafts")
_OPENING = {"token_ids": np.int64, "stop_ids": np.int64}
_BIAS = {"bias_ids": np.int64, "bias_values": np.float32}
_OPENING_INTS = ("sequence_id", "prompt_len", "max_new_tokens", "min_new_tokens", "wants_features")
_SAMPLING_INTS = ("top_k", "seed", "mode", "num_logprobs", "num_prompt_logprobs")
_SAMPLING_FLOATS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
_OF_STEP = [*_STEP.values(), *_DRAFTS.values(), *(np.int64 for _ in _FAULTS), np.bool_]
_OF_OPENING = [np.int64, np.float64, np.uint8, *_OPENING.values(), *_BIAS.values()]
_64_BITS = (1 << 64) - 1


def pack_step(step: StepInput) -> Ints:
    """What the other ranks need of a step that was checked: nothing of what is reported, or drafted after the pass.

    Own drafts have become drafts like any others by then.
    """
    arrays: list[NDArray[Any]] = [getattr(step, name) for name in _STEP]
    arrays += [getattr(step.drafts, name) for name in _DRAFTS]
    arrays += [np.array(list(getattr(step, name)), dtype=np.int64) for name in _FAULTS]
    arrays.append(np.array([step.is_ahead]))
    for opening in step.open:
        arrays += _pack_opening(opening)
    return pack_arrays(arrays)


def unpack_step(flat: Ints) -> StepInput:
    """The step of `pack_step`."""
    num_openings = (int(flat[0]) - len(_OF_STEP)) // len(_OF_OPENING)
    arrays = iter(unpack_arrays(flat, _OF_STEP + _OF_OPENING * num_openings))
    columns = {name: next(arrays) for name in _STEP}
    drafts = Drafts(**{name: next(arrays) for name in _DRAFTS})
    faults = {name: dict.fromkeys(next(arrays).tolist(), _FAULT) for name in _FAULTS}
    is_ahead = bool(next(arrays)[0])
    openings = [_unpack_opening(arrays) for _ in range(num_openings)]
    return StepInput(**columns, drafts=drafts, is_ahead=is_ahead, **faults, open=openings)


def _pack_opening(opening: Opening) -> Iterator[NDArray[Any]]:
    sampling = opening.sampling
    ints = [int(getattr(opening, name)) for name in _OPENING_INTS]
    ints += [int(getattr(sampling, name)) for name in _SAMPLING_INTS]
    yield np.array([value & _64_BITS for value in ints], dtype=np.uint64)  # ids and seeds use all bits
    yield np.array([getattr(sampling, name) for name in _SAMPLING_FLOATS])
    yield np.frombuffer(opening.cache_salt, dtype=np.uint8)
    yield from (getattr(opening, name) for name in _OPENING)
    yield from (getattr(sampling, name) for name in _BIAS)


def _unpack_opening(arrays: Iterator[NDArray[Any]]) -> Opening:
    ints = dict(zip(_OPENING_INTS + _SAMPLING_INTS, next(arrays).tolist(), strict=True))
    floats = dict(zip(_SAMPLING_FLOATS, next(arrays).tolist(), strict=True))
    cache_salt = next(arrays).tobytes()
    values = {name: next(arrays) for name in _OPENING}
    bias = {name: next(arrays) for name in _BIAS}
    sampling = {name: ints.pop(name) for name in _SAMPLING_INTS} | floats | bias
    sampling["seed"] &= _64_BITS
    ints["sequence_id"] &= _64_BITS
    ints["wants_features"] = bool(ints["wants_features"])
    return Opening(**ints, **values, sampling=SamplingParams(**sampling), cache_salt=cache_salt)
