"""A step of the target, on rank 0: from the router's message to one ragged pass, and from the verdict to commits.

Owns the sequences and their pages. Knows nothing of gRPC streams: the servicer hands in messages one at a time.
A bad entry gets its status and its neighbours go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from dflash_ray.core.draft_blocks import to_message
from dflash_ray.pb import common_pb2, target_pb2
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.plan import SequencePlan
from dflash_ray.sampling.verify import SequenceOutcome
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.colocated import ColocatedDrafter
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import StepHidden
from dflash_ray.target_group.page_allocator import PageAllocator
from dflash_ray.target_group.sequences import Draft, Sequence, drafts_of
from dflash_ray.target_group.step_check import check_sequence

OK = target_pb2.ENTRY_STATUS_OK
_FINISH_REASONS = (
    common_pb2.FINISH_REASON_UNSPECIFIED,
    common_pb2.FINISH_REASON_STOP,
    common_pb2.FINISH_REASON_LENGTH,
)


class StepRunner(Protocol):
    """The ranks together: one pass and its verdict."""

    def forward(self, batch: StepBatch, plan: list[SequencePlan]) -> StepHidden: ...

    def verify(self, hidden: StepHidden, plan: list[SequencePlan]) -> list[SequenceOutcome]: ...

    def score(self, hidden: StepHidden, batch: StepBatch) -> Logprobs: ...


@dataclass(slots=True)
class _Entry:
    """One entry of a step on its way through the pass."""

    sequence_id: int
    status: int = OK
    error: str = ""
    sequence: Sequence | None = None
    token_ids: list[int] = field(default_factory=list)  # rows: prefill chunk, or anchor and drafts
    draft: Draft = field(default_factory=Draft)
    is_verify: bool = False
    draws: bool = False
    num_accepted: int = 0
    kept: list[int] = field(default_factory=list)  # tokens committed
    finish_reason: int = common_pb2.FINISH_REASON_UNSPECIFIED
    logprobs: common_pb2.TokenLogprobs | None = None
    scored_tokens: list[int] = field(default_factory=list)  # of the prompt, after the entry's first rows

    @property
    def num_top(self) -> int:
        """Likeliest tokens wanted beside each scored one."""
        return self.sequence.sampling.num_prompt_logprobs if self.sequence is not None else 0


@dataclass(slots=True)
class StepFeatures:
    """Context features of the rows that a step kept: of sequence i num_rows[i] rows of `rows` from first_rows[i] on."""

    rows: torch.Tensor
    sequence_ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_rows: list[int] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)


@dataclass(slots=True)
class StepOutput:
    """What a step leaves: its result, and the features that no drafter here takes."""

    result: target_pb2.StepResult
    features: StepFeatures | None = None


class Engine:
    """Sequences, pages and steps of one target group.

    Args:
        drafter: colocated drafter that gets this group's features, which then leave in no step's output.
        features: where features are kept for replays; None where nothing replays.

    Attributes:
        is_in_pass: the ranks are at work; after an exception they may be out of step with each other.
    """

    def __init__(
        self,
        runner: StepRunner,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        vocab_size: int,
        drafter: ColocatedDrafter | None = None,
        features: FeatureStore | None = None,
    ) -> None:
        self._runner = runner
        self._page_size = page_size
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._drafter = drafter
        self._features = features
        self._sequences: dict[int, Sequence] = {}
        self.allocator = PageAllocator(num_pages)
        self.is_in_pass = False

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def close(self, sequence_ids: Iterable[int]) -> None:
        """Forgets sequences and frees their pages; unknown ids are ignored."""
        for sequence_id in sequence_ids:
            sequence = self._sequences.pop(sequence_id, None)
            if sequence is not None:
                self.allocator.free(sequence.pages)
                if self._drafter is not None:
                    self._drafter.close(sequence_id)

    def read_features(self, sequence_ids: Iterable[int], starts: Iterable[int], counts: Iterable[int]) -> torch.Tensor:
        """Context features [sum of counts, H] of computed rows; of sequences that are closed meanwhile, anything.

        May be called from another thread than the step's.
        """
        assert self._features is not None
        slots: list[int] = []
        for sequence_id, start, count in zip(sequence_ids, starts, counts, strict=True):
            sequence = self._sequences.get(sequence_id)
            slots += [0] * count if sequence is None else sequence.slots(start, start + count, self._page_size)
        return self._features.get(slots)

    def step(self, step: target_pb2.Step) -> StepOutput:
        """Runs one step; the result's entries are in the order of the step's."""
        started = time.perf_counter_ns()
        self.close(step.close)
        errors = self._open(step.open)
        entries = self._entries(step, errors)
        running = [entry for entry in entries if entry.status == OK]
        batch, plan = self._batch(running)
        self.is_in_pass = True
        hidden = self._runner.forward(batch, plan) if running else None
        forwarded = time.perf_counter_ns()
        outcomes = self._runner.verify(hidden, plan) if hidden is not None and plan else []
        scores = self._runner.score(hidden, batch) if hidden is not None else Logprobs()
        self.is_in_pass = False
        verified = time.perf_counter_ns()
        result = target_pb2.StepResult(step_id=step.step_id)
        output = StepOutput(result)
        result.prompt_logprobs.extend(_prompt_logprobs(running, scores))
        if hidden is not None and hidden.features is not None and self._drafter is None:
            output.features = StepFeatures(hidden.features.cpu())
        self._commit(running, outcomes, hidden, output.features)
        self._fill_columns(entries, result)
        if self._drafter is not None and step.colocated_draft_ids:
            result.colocated_drafts.CopyFrom(self._draft(step, self._drafter))
        drafted = time.perf_counter_ns()
        result.free_pages = self.allocator.num_free
        result.timings.forward_ns = forwarded - started
        result.timings.verify_ns = verified - forwarded
        result.timings.draft_ns = drafted - verified
        return output

    def _open(self, messages: Iterable[target_pb2.OpenSequence]) -> dict[int, str]:
        """Opens sequences; returns the errors of those that cannot be opened."""
        errors = {}
        for message in messages:
            self.close([message.sequence_id])
            try:
                check_sequence(message, self._max_model_len, self._vocab_size)
                sequence = Sequence.open(message, self._max_model_len, self._vocab_size)
            except ValueError as error:
                errors[message.sequence_id] = str(error)
                continue
            self._sequences[message.sequence_id] = sequence
        return errors

    def _entries(self, step: target_pb2.Step, errors: dict[int, str]) -> list[_Entry]:
        entries = []
        seen: set[int] = set()
        for sequence_id, length in zip(step.prefill_ids, step.prefill_lens, strict=True):
            entry = self._new_entry(sequence_id, errors, seen)
            if entry.sequence is not None:
                sequence = entry.sequence
                entry.token_ids = sequence.tokens[sequence.kv_len : sequence.kv_len + length]
                entry.draws = sequence.kv_len + len(entry.token_ids) == sequence.committed_len
                entry.scored_tokens = sequence.scored_tokens(sequence.kv_len, length)
                self._reserve(entry)
            entries.append(entry)
        for sequence_id, base_len, draft in zip(step.verify_ids, step.base_lens, drafts_of(step), strict=True):
            entry = self._new_entry(sequence_id, errors, seen)
            if entry.sequence is not None:
                self._check_verify(entry, base_len, draft)
            entries.append(entry)
        return entries

    def _new_entry(self, sequence_id: int, errors: dict[int, str], seen: set[int]) -> _Entry:
        if sequence_id in errors:
            return _Entry(sequence_id, target_pb2.ENTRY_STATUS_FAILED, errors[sequence_id])
        if sequence_id in seen:
            return _Entry(sequence_id, target_pb2.ENTRY_STATUS_FAILED, "the sequence is in the step twice")
        seen.add(sequence_id)
        sequence = self._sequences.get(sequence_id)
        status = OK if sequence is not None else target_pb2.ENTRY_STATUS_UNKNOWN
        return _Entry(sequence_id, status, sequence=sequence)

    def _check_verify(self, entry: _Entry, base_len: int, draft: Draft) -> None:
        sequence = entry.sequence
        assert sequence is not None
        entry.is_verify = entry.draws = True
        entry.draft = draft
        entry.token_ids = [sequence.tokens[-1], *draft.tokens]
        if base_len != sequence.committed_len or sequence.kv_len != sequence.committed_len - 1:
            entry.status = target_pb2.ENTRY_STATUS_STALE
        elif fault := draft.fault(self._vocab_size):
            entry.status, entry.error = target_pb2.ENTRY_STATUS_FAILED, fault
        elif sequence.committed_len + len(draft.tokens) > self._max_model_len:
            entry.status, entry.error = target_pb2.ENTRY_STATUS_FAILED, "drafts reach past the model's context"
        else:
            self._reserve(entry)

    def _reserve(self, entry: _Entry) -> None:
        """Gets the pages that the entry's rows need."""
        sequence = entry.sequence
        assert sequence is not None
        needed = -(-(sequence.kv_len + len(entry.token_ids)) // self._page_size) - len(sequence.pages)
        if needed <= 0:
            return
        pages = self.allocator.allocate(needed, sequence.pages[-1] if sequence.pages else None)
        if pages is None:
            entry.status = target_pb2.ENTRY_STATUS_NO_PAGES
        else:
            sequence.pages.extend(pages)

    def _batch(self, entries: list[_Entry]) -> tuple[StepBatch, list[SequencePlan]]:
        columns: dict[str, list[int]] = {name: [] for name in StepBatch.__slots__}
        plan = []
        for entry in entries:
            sequence = entry.sequence
            assert sequence is not None
            first, count = len(columns["token_ids"]), len(entry.token_ids)
            positions = range(sequence.kv_len, sequence.kv_len + count)
            columns["token_ids"] += entry.token_ids
            columns["positions"] += positions
            columns["slots"] += sequence.slots(positions.start, positions.stop, self._page_size)
            columns["entry_lens"].append(count)
            columns["context_lens"].append(sequence.kv_len)
            columns["page_counts"].append(len(sequence.pages))
            columns["pages"] += sequence.pages
            root = first if entry.is_verify else first + count - 1
            feature_row = len(columns["feature_rows"]) + root - first if sequence.wants_features else -1
            if entry.draws:
                columns["sample_rows"] += range(root, first + count)
                plan.append(sequence.plan(entry.draft, feature_row))
            if sequence.wants_features:
                columns["feature_rows"] += range(first, first + count)
            columns["scored_rows"] += range(first, first + len(entry.scored_tokens))
            columns["scored_tokens"] += entry.scored_tokens
        if columns["scored_rows"]:
            columns["num_top"] = [max(entry.num_top for entry in entries)]
        return StepBatch(**{name: np.array(values, dtype=np.int64) for name, values in columns.items()}), plan

    def _commit(
        self,
        entries: list[_Entry],
        outcomes: list[SequenceOutcome],
        hidden: StepHidden | None,
        kept: StepFeatures | None,
    ) -> None:
        """Commits what was accepted; everything else of the pass is rolled back by not being counted."""
        features = None if hidden is None else hidden.features
        verdicts = iter(outcomes)
        offset = 0
        for entry in entries:
            sequence = entry.sequence
            assert sequence is not None
            outcome = next(verdicts) if entry.draws else SequenceOutcome()
            start = sequence.kv_len
            num_kept = outcome.kv_len - start if entry.draws else len(entry.token_ids)
            rows = None
            if sequence.wants_features and features is not None:
                rows = features[offset : offset + num_kept]
                offset += len(entry.token_ids)
            if outcome.is_flagged:
                entry.status = target_pb2.ENTRY_STATUS_FAILED
                entry.error = "the target's logits are not finite"
                continue
            sequence.commit(outcome.tokens, start + num_kept)
            if rows is not None and self._drafter is not None:
                self._drafter.extend(sequence.sequence_id, start, rows, sequence.tokens[start : sequence.kv_len])
            elif rows is not None and kept is not None:
                self._keep_features(sequence, start, num_kept, offset - len(entry.token_ids), kept)
            entry.kept, entry.finish_reason = outcome.tokens, _FINISH_REASONS[outcome.finish]
            entry.num_accepted = min(len(outcome.accepted_rows), len(entry.kept))
            if outcome.logprobs is not None:
                entry.logprobs = _to_message(outcome.logprobs)

    def _keep_features(self, sequence: Sequence, start: int, count: int, first: int, kept: StepFeatures) -> None:
        """Stores the features of positions start, start + 1, ...: `count` rows from `first` on."""
        if self._features is not None:
            slots = sequence.slots(start, start + count, self._page_size)
            self._features.put(slots, kept.rows[first : first + count])
        kept.sequence_ids.append(sequence.sequence_id)
        kept.starts.append(start)
        kept.num_rows.append(count)
        kept.first_rows.append(first)

    def _fill_columns(self, entries: list[_Entry], result: target_pb2.StepResult) -> None:
        for entry in entries:
            result.sequence_ids.append(entry.sequence_id)
            result.statuses.append(entry.status)
            result.committed_lens.append(entry.sequence.committed_len if entry.sequence is not None else 0)
            result.num_accepted_drafts.append(entry.num_accepted)
            result.num_tokens.append(len(entry.kept))
            result.token_ids.extend(entry.kept)
            result.finish_reasons.append(entry.finish_reason)
            if entry.logprobs is not None:
                result.logprobs.append(entry.logprobs)
            if entry.status == target_pb2.ENTRY_STATUS_FAILED:
                result.errors.append(entry.error)

    def _draft(self, step: target_pb2.Step, drafter: ColocatedDrafter) -> common_pb2.DraftBlocks:
        """Drafts of the colocated drafter for sequences that are ready for them."""
        wanted = zip(step.colocated_draft_ids, step.colocated_num_drafts, strict=True)
        open_ones = [(self._sequences[at], count) for at, count in wanted if at in self._sequences]
        sequences, counts = [sequence for sequence, _ in open_ones], [count for _, count in open_ones]
        return to_message(step.epoch, drafter.draft(sequences, counts, max(1, step.num_candidates)))


def _prompt_logprobs(entries: Iterable[_Entry], scores: Logprobs) -> Iterator[common_pb2.PromptLogprobs]:
    """The scores of a pass, entry by entry, before its rows are committed."""
    at = 0
    for entry in entries:
        count = len(entry.scored_tokens)
        if count and entry.sequence is not None:
            part = scores.part(at, at + count, entry.num_top)
            start = entry.sequence.kv_len + 1
            yield common_pb2.PromptLogprobs(sequence_id=entry.sequence_id, start=start, logprobs=_to_message(part))
        at += count


def _to_message(logprobs: Logprobs) -> common_pb2.TokenLogprobs:
    message = common_pb2.TokenLogprobs(chosen=logprobs.chosen)
    if logprobs.top_ids:
        message.num_top = len(logprobs.top_ids[0])
        for ids, values in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True):
            message.top_token_ids.extend(ids)
            message.top_logprobs.extend(values)
    return message
