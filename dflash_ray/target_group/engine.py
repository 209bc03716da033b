"""A step of the target on one rank: from what changed to one ragged pass, and from the verdict to commits.

Owns the sequences and their pages. All ranks of a group run the same steps and reach the same verdicts, so that their
tables stay equal. A bad entry gets its status and its neighbours go on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dflash_ray.core.arrays import spans
from dflash_ray.models.context_features import PackedRows
from dflash_ray.models.feature_pages import Uses, pages_of
from dflash_ray.sampling.columns import PlanColumns, columns_of
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.parameters import NO_LOGPROBS
from dflash_ray.sampling.verify import Verdict
from dflash_ray.target_group.batch import Rows, StepBatch, build_batch
from dflash_ray.target_group.colocated import ColocatedDrafter
from dflash_ray.target_group.commits import Commit, accepted_drafts, commit, kept_features, rows_to_move, to_host
from dflash_ray.target_group.entries import Entries, drafts_of, find_entries, rows_of
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import StepHidden
from dflash_ray.target_group.own_drafts import OwnVerified
from dflash_ray.target_group.page_allocator import PageAllocator
from dflash_ray.target_group.prefix_cache import PrefixCache
from dflash_ray.target_group.slots import NO_SLOT, SlotTable
from dflash_ray.target_group.step import Ids, Ints, PromptLogprobs, StepFeatures, StepInput, StepOutput, no_ints


class StepRunner(Protocol):
    """This rank's part of a pass and of its verdict. Collective over the ranks.

    Attributes:
        device: where it takes a plan's columns.
    """

    device: torch.device

    def forward(self, batch: StepBatch, columns: PlanColumns | None) -> StepHidden:
        """Begins a pass; `columns` are those of its rows that draw."""

    def verify(self, hidden: StepHidden, columns: PlanColumns) -> Verdict: ...

    def score(self, hidden: StepHidden, batch: StepBatch) -> Logprobs: ...

    def move_rows(self, source: Ints, target: Ints) -> None: ...


class Lead(Protocol):
    """How the other ranks learn of a step."""

    def send(self, step: StepInput) -> None: ...


class Engine:
    """Sequences, pages and steps of one target group.

    Args:
        drafter: colocated drafter that gets this group's features, which then leave in no step's output.
        features: where features are kept for remote drafters, and for a colocated one beside a prefix cache; None where
            there are none.
        lead: on the rank that leads a group of several.
        caches_prefixes: sequences share the rows of equal beginnings, with those that are over as well.

    Attributes:
        is_in_pass: the ranks are at work; after an exception they may be out of step with each other.
        prefixes: None where none are cached.
    """

    def __init__(
        self,
        runner: StepRunner,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        drafter: ColocatedDrafter | None = None,
        features: FeatureStore | None = None,
        lead: Lead | None = None,
        caches_prefixes: bool = False,
    ) -> None:
        assert not (caches_prefixes and drafter and features is None), "a drafter needs the features of cached rows"
        self._runner = runner
        self._drafter = drafter
        self._features = features
        self._lead = lead
        self._closed: list[int] = []  # since the last step, of which the other ranks don't know yet
        self._table = SlotTable(max_model_len, page_size)
        self.allocator = PageAllocator(num_pages)
        self.prefixes = PrefixCache(self._table, self.allocator) if caches_prefixes else None
        self.is_in_pass = False

    @property
    def num_sequences(self) -> int:
        return len(self._table)

    def close(self, sequence_ids: Sequence[int]) -> None:
        """Forgets sequences and frees their pages; unknown ids are ignored."""
        if self._lead is not None:
            self._closed += sequence_ids
        self._forget(sequence_ids)

    def _forget(self, sequence_ids: Sequence[int]) -> None:
        if self._drafter is not None:
            slot_of = self._table.slot_of
            self._drafter.close([slot_of[sequence_id] for sequence_id in sequence_ids if sequence_id in slot_of])
        for sequence_id in sequence_ids:
            if self.prefixes is not None and (slot := self._table.slot_of.get(sequence_id)) is not None:
                self.prefixes.close(slot)
            self.allocator.free(self._table.close(sequence_id))

    def step(self, step: StepInput) -> StepOutput:
        """Runs one step that was checked (`step_check`); the output's entries are in the order of the step's."""
        started = time.perf_counter_ns()
        self.is_in_pass = True
        if self._lead is not None:
            step.close = np.concatenate((np.array(self._closed, dtype=np.uint64), step.close))
            self._closed = []
        self._change(step)
        own = self._resolve_own(step) if len(step.own_counts) else OwnVerified()
        if self._lead is not None:
            self._lead.send(step)
        entries = find_entries(self._table, self.allocator, step, self.prefixes)
        if self._drafter is not None:
            self._extend_by_found(self._drafter, entries)
        running = entries.running()
        rows = rows_of(self._table, entries, running)
        hidden = columns = verdict = None
        scores = Logprobs()
        if len(running):
            batch, drawing = build_batch(self._table, rows, drafts_of(step.drafts, running - entries.num_prefills))
            if len(drawing.slots):
                columns = columns_of(drawing, self._table.sampling, self._runner.device)
            hidden = self._runner.forward(batch, columns)
        forwarded = time.perf_counter_ns()
        if hidden is not None:
            if columns is not None:
                verdict = self._runner.verify(hidden, columns)
            scores = self._runner.score(hidden, batch)
        verified = time.perf_counter_ns()
        prompt_logprobs = self._prompt_logprobs(rows, entries.sequence_ids[running], scores)
        if verdict is not None and len(batch.parents):
            self._runner.move_rows(*rows_to_move(self._table, rows, verdict))
        done = commit(self._table, rows, verdict)
        if self.prefixes is not None:
            self.prefixes.name_pages(rows.slots)
        if np.count_nonzero(done.is_flagged):
            for index in running[done.is_flagged].tolist():
                entries.fail(index, "the target's logits are not finite")
        output = self._output(step, entries, running, done)
        output.prompt_logprobs = prompt_logprobs
        output.own_counts, output.own_log_probs, output.own_parents = own.counts, own.log_probs, own.parents
        if verdict is not None and len(batch.parents):
            output.accepted_drafts = accepted_drafts(rows, verdict, done)
        if verdict is not None and verdict.logprobs is not None:
            output.logprobs = self._logprobs(rows, verdict, verdict.logprobs)
        self.is_in_pass = False
        if hidden is not None and hidden.features is not None:
            output.features = self._take_features(rows, done, entries.sequence_ids[running], hidden.features)
        if self._drafter is not None and len(step.draft_ids):
            output.colocated_drafts = self._drafter.draft(
                self._table, step.draft_ids, step.draft_counts, step.num_candidates, step.tree_width
            )
        output.forward_ns, output.verify_ns = forwarded - started, verified - forwarded
        output.draft_ns = time.perf_counter_ns() - verified
        return output

    @property
    def is_settled(self) -> bool:
        """Whether `settle` has nothing to do."""
        return self._table.sampling.is_settled

    def settle(self) -> None:
        """Counts a step's tokens for penalties, which the next one does where it was not done before."""
        self._table.sampling.settle()

    def keep_features(self, features: StepFeatures) -> None:
        """Stores the features of a step for remote drafters, in the order of the steps; from any thread."""
        assert self._features is not None
        self._features.put(features)

    def read_features(self, sequence_ids: Ids, starts: Ints, counts: Ints) -> PackedRows:
        """Context features of computed rows of sequences that are not closed before they are copied.

        May be called from another thread than the step's.
        """
        assert self._features is not None
        slots = self._table.slots(sequence_ids)
        return self._features.read(self._table.cache_rows(np.repeat(slots, counts), spans(starts, counts)))

    def name_features(self, sequence_ids: Ids, starts: Ints, counts: Ints) -> tuple[Ints, Uses]:
        """Where the rows of `read_features` lie in shared memory: their pages, and how often these have been begun."""
        assert self._features is not None
        firsts, num_pages = pages_of(starts, counts, self._table.page_size)
        slot_of = np.repeat(self._table.slots(sequence_ids), num_pages)
        pages: Ints = self._table.pages[slot_of, spans(firsts, num_pages)]
        return pages, self._features.uses(pages)

    def _change(self, step: StepInput) -> None:
        """Closes and opens the sequences that the step names."""
        if len(step.close):
            self._forget(step.close.tolist())
        for index, opening in enumerate(step.open):
            self._forget([opening.sequence_id])
            if index not in step.faults_of_open:
                slot = self._table.open(opening)
                if self.prefixes is not None:
                    self.prefixes.open(slot, opening.cache_salt)

    def _resolve_own(self, step: StepInput) -> OwnVerified:
        """Puts own drafts into the step, on the rank that has them."""
        if self._drafter is None:
            return OwnVerified(np.zeros_like(step.own_counts))
        return self._drafter.own.resolve(self._table, step)

    def _extend_by_found(self, drafter: ColocatedDrafter, entries: Entries) -> None:
        """Gives a colocated drafter the features of rows that were found computed."""
        for index, count in entries.found.items():
            slot, end = int(entries.slots[index]), int(entries.starts[index])
            if self._features is None or slot == NO_SLOT or not self._table.wants_features[slot]:
                continue
            positions = np.arange(end - count, end)
            cache_rows = self._table.cache_rows(np.full(count, slot), positions)
            columns = (positions[:1], np.array([count]), np.zeros(1, dtype=np.int64))
            found = StepFeatures(
                entries.sequence_ids[index : index + 1], *columns, self._features.get(cache_rows), cache_rows
            )
            drafter.extend(self._table, found)

    def _prompt_logprobs(self, rows: Rows, sequence_ids: Ids, scores: Logprobs) -> list[PromptLogprobs]:
        """The scores of a pass, entry by entry."""
        found: list[PromptLogprobs] = []
        at = 0
        for entry in rows.num_scored.nonzero()[0].tolist():
            count, num_top = int(rows.num_scored[entry]), int(self._table.num_prompt_logprobs[rows.slots[entry]])
            part = scores.part(at, at + count, num_top)
            found.append(PromptLogprobs(int(sequence_ids[entry]), int(rows.starts[entry]) + 1, part))
            at += count
        return found

    def _logprobs(self, rows: Rows, verdict: Verdict, scores: Logprobs) -> list[Logprobs]:
        """The scores of the tokens kept, sequence by sequence."""
        wanted = self._table.sampling.num_logprobs[rows.slots[rows.draws]]
        found = []
        at = 0
        for sequence in np.flatnonzero((wanted != NO_LOGPROBS) & ~verdict.is_flagged).tolist():
            stop = at + int(verdict.num_tokens[sequence])
            found.append(scores.part(at, stop, int(wanted[sequence])))
            at = stop
        return found

    def _output(self, step: StepInput, entries: Entries, running: Ints, done: Commit) -> StepOutput:
        columns = np.zeros((3, len(entries.slots)), dtype=np.int64)
        columns[:, running] = done.num_accepted, done.num_tokens, done.finishes
        slots = np.maximum(entries.slots, 0)
        committed_lens, prefilled = self._table.committed_lens[slots], slots[: entries.num_prefills]
        has_prefills = entries.num_prefills > 0
        return StepOutput(
            step_id=step.step_id,
            sequence_ids=entries.sequence_ids,
            statuses=entries.statuses,
            committed_lens=np.where(entries.slots == NO_SLOT, 0, committed_lens),
            num_accepted=columns[0],
            num_tokens=columns[1],
            token_ids=done.token_ids,
            finishes=columns[2],
            kv_lens=self._table.kv_lens[prefilled] if has_prefills else no_ints(),
            cached_lens=self._table.cached_lens[prefilled] if has_prefills else no_ints(),
            errors=[entries.errors[index] for index in sorted(entries.errors)],
            logprobs=[],
            prompt_logprobs=[],
            free_pages=self.allocator.num_free,
        )

    def _take_features(self, rows: Rows, done: Commit, sequence_ids: Ids, features: Tensor) -> StepFeatures | None:
        """Features [F, H] of a pass go to the colocated drafter, or leave with the output."""
        kept = kept_features(self._table, rows, done, sequence_ids, features)
        if self._drafter is not None:
            self._drafter.extend(self._table, kept)
            if self._features is not None:
                self._features.put(kept)
            return None
        return kept if features.device.type == "cpu" else to_host(kept)
