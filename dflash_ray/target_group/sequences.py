"""A live sequence on the target: the committed tokens (the truth), its pages, its limits.

Regions of a sequence, by position:
    [0, kv_len)          computed: keys and values in the cache, features known
    kv_len ...           known but not computed: the rest of a prompt, or the anchor token alone when decoding
    committed_len        draft rows of the pass that runs; rolled back by leaving kv_len where it is
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from dflash_ray.models.dflash2 import Draw
from dflash_ray.pb import common_pb2, target_pb2
from dflash_ray.sampling.plan import COUPLED, NO_LOGPROBS, REJECTION, SequencePlan

_MAX_LOG_PROB = 1e-3  # rounding may leave a certain draft above 0
_MODES = {common_pb2.VERIFY_MODE_REJECTION: REJECTION}


@dataclass(frozen=True, slots=True)
class Draft:
    """What an entry brings to be verified, columns as in `target_pb2.Step`."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    num_candidates: int = 0
    candidate_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def fault(self, vocab_size: int) -> str | None:
        """Why it cannot be verified."""
        if self.parents != list(range(len(self.tokens))):
            return "only chains of drafts can be verified"
        if any(token >= vocab_size for token in self.tokens):
            return f"drafts must be below {vocab_size}"
        size = self.num_candidates * len(self.tokens)
        if not len(self.candidate_ids) == len(self.log_probs) == size:
            return f"{size} draft candidates and log-probabilities belong to num_draft_candidates {self.num_candidates}"
        if self.num_candidates and self.candidate_ids[:: self.num_candidates] != self.tokens:
            return "the first candidate of a draft must be the draft"
        if not all(value <= _MAX_LOG_PROB for value in self.log_probs):
            return "draft_log_probs must be at most 0"
        return None


def drafts_of(step: target_pb2.Step) -> Iterator[Draft]:
    """The drafts of a step's verify entries, in order."""
    at = candidates_at = 0
    for i, count in enumerate(step.num_drafts):
        stop = at + count
        num_candidates = step.num_draft_candidates[i] if step.num_draft_candidates else 0
        candidates_stop = candidates_at + count * num_candidates
        yield Draft(
            list(step.draft_token_ids[at:stop]),
            list(step.draft_parents[at:stop]),
            num_candidates,
            list(step.draft_candidate_ids[candidates_at:candidates_stop]),
            list(step.draft_log_probs[candidates_at:candidates_stop]),
        )
        at, candidates_at = stop, candidates_stop


@dataclass(slots=True)
class Sequence:
    """One open sequence."""

    sequence_id: int
    tokens: list[int]
    prompt_len: int
    sampling: common_pb2.SamplingParams
    stop_ids: frozenset[int]
    min_new_tokens: int
    max_len: int  # tokens at which it ends: max_new_tokens or the model's context
    wants_features: bool
    kv_len: int = 0
    pages: list[int] = field(default_factory=list)
    history: dict[int, int] = field(default_factory=dict)  # token -> times in the output; 0 for prompt tokens
    has_penalties: bool = False

    @classmethod
    def open(cls, message: target_pb2.OpenSequence, max_model_len: int, vocab_size: int) -> Sequence:
        """From a message that was checked (`step_check.check_sequence`)."""
        tokens = list(message.token_ids)
        sampling = message.sampling
        has_penalties = bool(
            sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
        )
        sequence = cls(
            sequence_id=message.sequence_id,
            tokens=tokens,
            prompt_len=message.prompt_len,
            sampling=sampling,
            stop_ids=frozenset(token for token in message.stopping.stop_token_ids if token < vocab_size),
            min_new_tokens=message.stopping.min_new_tokens,
            max_len=min(max_model_len, message.prompt_len + message.stopping.max_new_tokens),
            wants_features=message.wants_features,
            has_penalties=has_penalties,
        )
        if has_penalties:
            if sampling.repetition_penalty != 1:
                sequence.history = dict.fromkeys(tokens[: message.prompt_len], 0)
            sequence._count(tokens[message.prompt_len :])
        return sequence

    @property
    def committed_len(self) -> int:
        return len(self.tokens)

    def commit(self, new_tokens: list[int], kv_len: int) -> None:
        """Appends the tokens of a pass after which the first `kv_len` rows are in the cache."""
        self.tokens.extend(new_tokens)
        self.kv_len = kv_len
        if self.has_penalties:
            self._count(new_tokens)

    def _count(self, tokens: list[int]) -> None:
        for token in tokens:
            self.history[token] = self.history.get(token, 0) + 1

    def scored_tokens(self, start: int, count: int) -> list[int]:
        """The prompt's tokens after rows start ... start + count - 1, where their log-probabilities are wanted."""
        if not self.sampling.HasField("num_prompt_logprobs") or self.committed_len > self.prompt_len:
            return []
        return self.tokens[start + 1 : start + 1 + count]

    def plan(self, draft: Draft, feature_row: int) -> SequencePlan:
        """The rows that draw: the last committed token, whose feature is in `feature_row`, and the drafts after it."""
        sampling = self.sampling
        return SequencePlan(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            mode=_MODES.get(sampling.mode, COUPLED),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            num_logprobs=sampling.num_logprobs if sampling.HasField("num_logprobs") else NO_LOGPROBS,
            position=self.committed_len - 1,
            tokens=[self.tokens[-1], *draft.tokens],
            parents=[-1, *draft.parents],
            bias_ids=list(sampling.bias_token_ids),
            bias_values=list(sampling.bias_values),
            banned_ids=sorted(self.stop_ids) if self.min_new_tokens else [],
            ban_below=self.prompt_len + self.min_new_tokens if self.min_new_tokens else 0,
            history_ids=list(self.history),
            history_counts=list(self.history.values()),
            stop_ids=sorted(self.stop_ids),
            min_len=self.prompt_len + self.min_new_tokens,
            max_len=self.max_len,
            feature_row=feature_row,
            num_candidates=draft.num_candidates,
            candidate_ids=draft.candidate_ids,
            candidate_probs=[math.exp(value) for value in draft.log_probs],
        )

    def draw(self) -> Draw:
        """What a drafter may know of its draws."""
        is_rejection = self.sampling.mode == common_pb2.VERIFY_MODE_REJECTION
        return Draw(self.sampling.temperature, self.sampling.seed, is_rejection)

    def slots(self, start: int, stop: int, page_size: int) -> list[int]:
        """Rows of the cache, and of the feature store, for positions [start, stop)."""
        return [self.pages[at // page_size] * page_size + at % page_size for at in range(start, stop)]
