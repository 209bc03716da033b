"""How a sequence's tokens are drawn, as whoever opens it says."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dflash_ray.kernels.columns import Mode

COUPLED, REJECTION = int(Mode.COUPLED), int(Mode.REJECTION)
NO_LOGPROBS = -1
NO_LIMIT = 1 << 40
COLDEST = 1e-5  # below this temperature the law is the argmax in all but name, and 1/T would overflow


def _no_ids() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


def _no_values() -> NDArray[np.float32]:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The defaults are greedy, with everything else off.

    Attributes:
        seed: key of the draws, of 64 bits.
        bias_ids, bias_values: added to logits.
        num_logprobs: likeliest tokens wanted beside each token of the output, NO_LOGPROBS for none of it.
        num_prompt_logprobs: the same of the prompt.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    mode: int = COUPLED
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    num_logprobs: int = NO_LOGPROBS
    num_prompt_logprobs: int = NO_LOGPROBS
    bias_ids: NDArray[np.int64] = field(default_factory=_no_ids)
    bias_values: NDArray[np.float32] = field(default_factory=_no_values)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
