"""What runs in the benchmarks of the host, the clock that is read, and the texts that everybody says."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dflash_ray.config import DflashRayConfig
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.pb import common_pb2, router_pb2
from dflash_ray.text.tokenizer import ChatTokenizer

FINGERPRINT = "canned"
DRAFTS = 7
KEPT_DRAFTS = 2
WORDS = 1000  # distinct tokens of all texts
CHUNK = 65_536  # rows of a prefill pass
SEQUENCES_A_DRAFTER = 128
PAGE = 16


@dataclass(frozen=True, slots=True)
class Case:
    """What runs: sequences of `context` tokens, each with DRAFTS drafts a step; features of `width` values.

    Attributes:
        is_colocated: the drafter is in the target, whose features go to nobody.
        sends_rows: features travel in messages, as they do to drafters on other machines.
        policy: of the router; `drafts` a step where it is fixed.
        is_cold: what a pass reads is larger than the caches, as weights are: all around it finds its memory cold.
        prompt_width: of the prompts' features; narrow ones make the start, which is not counted, short.
        room: tokens that a text may grow by.
    """

    sequences: int
    context: int
    penalties: bool = False
    tp: int = 1
    is_colocated: bool = False
    sends_rows: bool = False
    policy: str = "fixed"
    drafts: int = DRAFTS
    is_cold: bool = False
    width: int = 4096
    dtype: str = "bfloat16"
    prompt_width: int = 1
    room: int = 2048

    @property
    def name(self) -> str:
        context = f"{self.context // 1024}k" if self.context >= 1024 else str(self.context)
        parts = [f"{self.sequences} x {self.drafts + 1}", context]
        parts += [self.policy] * (self.policy != "fixed") + ["cold"] * self.is_cold
        parts += ["penalties"] * self.penalties + [f"TP {self.tp}"] * (self.tp > 1)
        return ", ".join(parts + ["colocated"] * self.is_colocated + ["in messages"] * self.sends_rows)

    def config(self) -> DflashRayConfig:
        """Nothing waits for a clock, and one pass takes what there is."""
        tokens = self.context + self.room
        return DflashRayConfig.model_validate(
            {
                "model": {"max_model_len": tokens},
                "target": {
                    "kv_cache_tokens": self.sequences * tokens,
                    "page_size": PAGE,
                    "max_batch_tokens": max(CHUNK, self.sequences * (DRAFTS + 1)),
                    "tp_size": self.tp,
                    "step_timeout_s": 1e6,
                },
                "drafter": {"num_replicas": max(1, self.num_drafters), "step_timeout_s": 1e6},
                "router": {
                    "max_running": self.sequences,
                    "max_waiting": self.sequences,
                    "policy": self.policy,
                    "draft_tokens": self.drafts,
                    "draft_timeout_ms": 1e9,
                    "prefill_chunk_tokens": CHUNK,
                },
                "network": {"max_message_bytes": 2**31 - 1},
            }
        )

    @property
    def num_drafters(self) -> int:
        """As many as keep one request to each below its limit of features."""
        return 0 if self.is_colocated else -(-self.sequences // SEQUENCES_A_DRAFTER)


class Clock:
    """CPU time of this thread, charged to the part that runs; nothing is charged before the first part."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        self._part: str | None = None
        self._since = 0

    def to(self, part: str | None) -> None:
        """From here on `part` runs, or what is not counted."""
        now = time.thread_time_ns()
        if self._part is not None:
            self.ns[self._part] += now - self._since
        self._part, self._since = part, time.thread_time_ns()


@dataclass(slots=True)
class Texts:
    """What every sequence says: its tokens by position, the same for target, drafter and prompt."""

    case: Case
    tokenizer: ChatTokenizer
    tokens: np.ndarray[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        words = [token for token in range(self.tokenizer.vocab_size) if self._is_word(token)][:WORDS]
        generator = np.random.default_rng(0)
        shape = self.case.sequences, self.case.context + self.case.room
        drawn = generator.integers(0, WORDS, shape)
        # The first ones differ, so that every prompt of 1,000 tokens has all words in its history.
        every_word = generator.permuted(np.tile(np.arange(WORDS), (shape[0], 1)), axis=1)
        drawn[:, :WORDS] = every_word[:, : shape[1]]
        self.tokens = np.array(words)[drawn]

    def _is_word(self, token: int) -> bool:
        text = self.tokenizer.decode([token])
        return len(text) > 3 and text.strip().isalpha() and text.isascii()

    def request(self, index: int) -> GenerationRequest:
        """A sequence's request; its seed is its number, by which the canned parts know it."""
        sampling = common_pb2.SamplingParams(temperature=0.8, top_p=0.95, seed=index, repetition_penalty=1.0)
        if self.case.penalties:
            sampling.repetition_penalty, sampling.presence_penalty = 1.1, 0.1
        return GenerationRequest(
            request_id=f"{index:032}",
            prompt_ids=self.tokens[index, : self.case.context].tolist(),
            sampling=sampling,
            stopping=common_pb2.StoppingParams(
                max_new_tokens=self.case.room - 2 * (DRAFTS + 1), stop_token_ids=self.tokenizer.eos_ids
            ),
            speculation=router_pb2.Speculation(),
            eos_ids=self.tokenizer.eos_ids,
        )
