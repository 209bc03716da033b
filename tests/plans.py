"""Plans of a step as lists of sequences, and their columns made the slow and obvious way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_ray.kernels.columns import FloatColumn, IntColumn, Mode, PlanTensors
from dflash_ray.sampling import verify as verify_module
from dflash_ray.sampling.columns import PlanColumns
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.parameters import COLDEST, NO_LIMIT, NO_LOGPROBS
from dflash_ray.sampling.ranks import RankGroup
from dflash_ray.sampling.table import Need


@dataclass(slots=True)
class SequencePlan:
    """One sequence's part of a plan.

    Attributes:
        seed, position: key of the draws; position of the root row's token.
        tokens, parents: of the rows, root first; a parent is an index into the rows, -1 for the root.
        bias_ids, bias_values: added to logits.
        banned_ids, ban_below: tokens that may not be drawn for positions below ban_below.
        history_ids, history_counts: tokens seen so far, and how often in the output; the root's token is included.
        num_candidates: candidates of each draft of a chain that was drawn, in rejection mode; 0 when none was.
        candidate_ids, candidate_probs: [rows but the root, num_candidates], the draft's token first, and the
            probabilities that it was drawn with.
        stop_ids: tokens that end a sequence of more than min_len tokens; max_len: length at which it ends.
        feature_row: row of the root in the step's context features, -1 when it has none.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    mode: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    num_logprobs: int
    position: int
    tokens: list[int]
    parents: list[int]
    bias_ids: list[int] = field(default_factory=list)
    bias_values: list[float] = field(default_factory=list)
    banned_ids: list[int] = field(default_factory=list)
    ban_below: int = 0
    history_ids: list[int] = field(default_factory=list)
    history_counts: list[int] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    min_len: int = 0
    max_len: int = NO_LIMIT
    feature_row: int = -1
    num_candidates: int = 0
    candidate_ids: list[int] = field(default_factory=list)
    candidate_probs: list[float] = field(default_factory=list)

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    def depths(self) -> list[int]:
        """Distance of every row from the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths


def to_columns(plan: Sequence[SequencePlan], device: torch.device) -> PlanColumns:
    """Columns of a plan, made from nothing: what those gathered from a table must say."""
    rows: list[tuple[int, int, int, int]] = []
    children: list[int] = []
    ints = np.zeros((len(plan), len(IntColumn)), dtype=np.int64)
    floats = np.zeros((len(plan), len(FloatColumn)), dtype=np.float32)
    ids: list[int] = []
    values: list[float] = []
    depth = 1
    for index, sequence in enumerate(plan):
        first = len(rows)
        depths = sequence.depths()
        depth = max(depth, 1 + max(depths))
        for token, parent, below in zip(sequence.tokens, sequence.parents, depths, strict=True):
            at = parent if parent < 0 else first + parent
            rows.append((index, sequence.position + below + 1, token, at))
            children.append(-1)
            if at >= 0 and children[at] < 0:
                children[at] = token
        ranges = (
            sorted(zip(sequence.history_ids, sequence.history_counts, strict=True)),
            zip(sequence.bias_ids, sequence.bias_values, strict=True),
            ((token, 0.0) for token in sequence.banned_ids),
            ((token, 0.0) for token in sequence.stop_ids),
        )
        bounds = []
        for pairs in ranges:
            begin = len(ids)
            for token, value in pairs:
                ids.append(token)
                values.append(value)
            bounds += [begin, len(ids) - begin]
        seed = sequence.seed - (1 << 64) if sequence.seed >> 63 else sequence.seed
        ints[index] = (
            seed, sequence.mode, sequence.top_k, first, len(sequence.tokens), sequence.position, sequence.ban_below,
            sequence.min_len, sequence.max_len, sequence.feature_row, *bounds,
        )  # fmt: skip
        floats[index] = (
            1.0 / sequence.temperature if sequence.temperature >= COLDEST else 0.0,
            sequence.top_p,
            math.log(sequence.min_p) if sequence.min_p > 0 else -math.inf,
            sequence.presence_penalty, sequence.frequency_penalty, sequence.repetition_penalty,
        )  # fmt: skip
    drawn = [sequence for sequence in plan if sequence.temperature >= COLDEST]
    is_rejection = any(sequence.mode == Mode.REJECTION for sequence in drawn)
    draft_ids, draft_probs = _drafts(plan, children) if is_rejection else (np.zeros((0, 0)), np.zeros((0, 0)))

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    needs = {
        Need.DRAW: bool(drawn),
        Need.REJECTION: is_rejection,
        Need.MIN_P: any(sequence.min_p > 0 for sequence in drawn),
        Need.TOP_K: any(sequence.top_k > 0 for sequence in drawn),
        Need.TOP_P: any(sequence.top_p < 1 for sequence in drawn),
        Need.ADJUSTMENT: any(s.has_penalties or s.bias_ids or s.banned_ids for s in plan),
        Need.LOGPROBS: any(sequence.num_logprobs != NO_LOGPROBS for sequence in plan),
        Need.COUNTS: any(sequence.has_penalties for sequence in plan),
    }
    return PlanColumns(
        tensors=PlanTensors(
            move(np.array(rows, dtype=np.int64).reshape(-1, 4)),
            move(ints),
            move(floats),
            move(np.array(ids, dtype=np.int64)),
            move(np.array(values, dtype=np.float32)),
        ),
        draft_ids=move(draft_ids.astype(np.int64)),
        draft_probs=move(draft_probs.astype(np.float32)),
        depth=depth,
        needs=sum(need for need, is_there in needs.items() if is_there),
        first_rows=ints[:, IntColumn.FIRST_ROW].copy(),
        num_logprobs=np.array([sequence.num_logprobs for sequence in plan], dtype=np.int64),
    )


def _drafts(plan: Sequence[SequencePlan], children: list[int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """draft_ids and draft_probs [R, K] of rows whose first children are `children`."""
    width = max(1, *(sequence.num_candidates for sequence in plan))
    ids, probs = np.full((len(children), width), -1), np.zeros((len(children), width))
    ids[:, 0], probs[:, 0] = children, 1
    first = 0
    for sequence in plan:
        count = sequence.num_candidates
        if count:
            # A chain: the child of row i is row i + 1, whose candidates are the i-th.
            chain = slice(first, first + sequence.num_rows - 1)
            ids[chain, :count] = np.reshape(sequence.candidate_ids, (-1, count))
            probs[chain, :count] = np.reshape(sequence.candidate_probs, (-1, count))
        first += sequence.num_rows
    return ids, probs


@dataclass(slots=True)
class SequenceOutcome:
    """A verdict's part of one sequence."""

    accepted_rows: list[int]
    tokens: list[int]
    is_flagged: bool
    finish: int
    kv_len: int
    logprobs: tuple[list[float], list[list[int]], list[list[float]]] | None = None


def verify(
    logits: torch.Tensor,
    vocab_start: int,
    plan: Sequence[SequencePlan],
    group: RankGroup,
    features: torch.Tensor | None = None,
) -> list[SequenceOutcome]:
    """`sampling.verify.verify` of a plan; outcomes of flagged sequences have nothing else in them."""
    verdict = verify_module.verify(logits, vocab_start, to_columns(plan, logits.device), group, features)
    outcomes = []
    at = 0
    for i, sequence in enumerate(plan):
        if verdict.is_flagged[i]:
            outcomes.append(SequenceOutcome([], [], True, 0, 0))
            continue
        count = int(verdict.num_tokens[i])
        outcome = SequenceOutcome(
            verdict.accepted_rows[i, : verdict.num_accepted[i]].tolist(),
            verdict.tokens[i, :count].tolist(),
            False,
            int(verdict.finishes[i]),
            int(verdict.kv_lens[i]),
        )
        if sequence.num_logprobs != NO_LOGPROBS:
            assert verdict.logprobs is not None
            outcome.logprobs = as_lists(verdict.logprobs.part(at, at + count, sequence.num_logprobs))
            at += count
        outcomes.append(outcome)
    return outcomes


def as_lists(logprobs: Logprobs) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """Chosen, top ids and top log-probabilities."""
    return logprobs.chosen.tolist(), logprobs.top_ids.tolist(), logprobs.top_logprobs.tolist()
