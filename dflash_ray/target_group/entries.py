"""What of a step can run: entries with their statuses, as the sequences' states and the free pages decide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dflash_ray.sampling.parameters import NO_LOGPROBS
from dflash_ray.target_group.batch import Rows
from dflash_ray.target_group.page_allocator import PageAllocator
from dflash_ray.target_group.prefix_cache import PrefixCache
from dflash_ray.target_group.slots import NO_SLOT, SlotTable
from dflash_ray.target_group.step import Drafts, EntryStatus, Ids, Ints, StepInput

_OK, _STALE, _UNKNOWN, _ENDED = (
    int(status) for status in (EntryStatus.OK, EntryStatus.STALE, EntryStatus.UNKNOWN, EntryStatus.ENDED)
)  # a member that is looked up takes ten times as long


@dataclass(slots=True)
class Entries:
    """E entries of a step: P prefills, then verifies.

    Attributes:
        slots: [E], NO_SLOT for sequences that are unknown or could not be opened.
        starts, counts: [E] position of the first row, rows; 0 rows of prefills that wait for others' in this step.
        errors: a text for each that failed, by index.
        found: indices of prefills that found rows computed just now, and how many: those before `starts`.
    """

    sequence_ids: Ids
    slots: Ints
    statuses: Ints
    starts: Ints
    counts: Ints
    num_prefills: int
    errors: dict[int, str]
    found: dict[int, int]

    def fail(self, index: int, error: str) -> None:
        self.statuses[index], self.errors[index] = EntryStatus.FAILED, error

    def running(self) -> Ints:
        """Indices of those that run."""
        indices: Ints = ((self.statuses == _OK) & (self.counts > 0)).nonzero()[0]
        return indices


def find_entries(
    table: SlotTable, allocator: PageAllocator, step: StepInput, prefixes: PrefixCache | None = None
) -> Entries:
    """The step's entries; those that are to run have the pages that their rows need."""
    num_prefills = len(step.prefill_ids)
    verifies = slice(num_prefills, None)
    sequence_ids = np.concatenate((step.prefill_ids, step.verify_ids)) if num_prefills else step.verify_ids
    slots = table.slots(sequence_ids)
    is_known = slots != NO_SLOT
    found = {} if prefixes is None else _find_rows(prefixes, slots[:num_prefills])
    places = np.maximum(slots, 0)
    starts, committed_lens = table.kv_lens[places], table.committed_lens[places]
    counts = 1 + step.drafts.counts
    if num_prefills:
        counts = np.concatenate((np.minimum(step.prefill_lens, (committed_lens - starts)[:num_prefills]), counts))
    base_lens = table.base_lens[places] if step.is_ahead else committed_lens
    is_stale = (step.base_lens != base_lens[verifies]) | (starts + 1 != committed_lens)[verifies]
    statuses = np.where(is_known, _OK, _UNKNOWN)
    if np.count_nonzero(is_stale):
        statuses[verifies][is_stale & is_known[verifies]] = _STALE
    is_over = table.is_over[places] & is_known
    if np.count_nonzero(is_over):
        statuses[verifies][is_over[verifies]] = _ENDED
    entries = Entries(sequence_ids, slots, statuses, starts, counts, num_prefills, {}, found)
    for index, fault in step.faults_of_drafts.items():
        if statuses[num_prefills + index] == _OK:
            entries.fail(num_prefills + index, fault)
    for index in ((statuses == _OK) & (starts + counts > table.max_model_len)).nonzero()[0].tolist():
        entries.fail(index, "drafts reach past the model's context")
    _fail_misfits(step, entries)
    if prefixes is not None and num_prefills > 1:
        ready = (statuses[:num_prefills] == _OK).nonzero()[0]
        counts[ready[prefixes.waits(slots[ready], counts[ready])]] = 0
    _reserve(table, allocator, entries)
    return entries


def _find_rows(prefixes: PrefixCache, slots: Ints) -> dict[int, int]:
    """Rows that these prefills' sequences have computed already, by index; those with none are left out."""
    rows = {index: prefixes.find(slot) for index, slot in enumerate(slots.tolist()) if slot != NO_SLOT}
    return {index: count for index, count in rows.items() if count}


def _fail_misfits(step: StepInput, entries: Entries) -> None:
    """Entries of sequences that could not be opened, and all but the first of a sequence."""
    ids = entries.sequence_ids.tolist()
    if not step.faults_of_open and len(set(ids)) == len(ids):
        return
    faults = {step.open[index].sequence_id: fault for index, fault in step.faults_of_open.items()}
    seen: set[int] = set()
    for index, sequence_id in enumerate(ids):
        fault = faults.get(sequence_id, "the sequence is in the step twice" if sequence_id in seen else "")
        if fault:
            entries.fail(index, fault)
            entries.slots[index] = NO_SLOT
        seen.add(sequence_id)


def _reserve(table: SlotTable, allocator: PageAllocator, entries: Entries) -> None:
    """Gets the pages that the entries' rows need."""
    held = table.page_counts[entries.slots]
    needed = -(-(entries.starts + entries.counts) // table.page_size) - held
    growing = ((needed > 0) & (entries.statuses == _OK)).nonzero()[0]
    if not len(growing):
        return
    if needed[growing].sum() <= allocator.num_free:
        # Nobody goes without, so the order does not matter: those that take a page more, as decoding does, go together.
        is_next = (needed[growing] == 1) & (held[growing] > 0)
        slots = entries.slots[growing[is_next]]
        table.add_page(slots, allocator.allocate_next(table.pages[slots, table.page_counts[slots] - 1]))
        growing = growing[~is_next]
    for index in growing.tolist():
        slot, count = int(entries.slots[index]), int(held[index])
        last = int(table.pages[slot, count - 1]) if count else None
        pages = allocator.allocate(int(needed[index]), last)
        if pages is None:
            entries.statuses[index] = EntryStatus.NO_PAGES
        else:
            table.add_pages(slot, pages)


def rows_of(table: SlotTable, entries: Entries, running: Ints) -> Rows:
    """The rows of the entries that run."""
    slots, starts, counts = entries.slots[running], entries.starts[running], entries.counts[running]
    if not entries.num_prefills:
        yes, none = np.ones(len(slots), dtype=np.bool_), np.zeros(len(slots), dtype=np.int64)
        return Rows(slots=slots, starts=starts, counts=counts, is_verify=yes, draws=yes, num_scored=none)
    committed_lens, is_verify = table.committed_lens[slots], running >= entries.num_prefills
    is_scored = (table.num_prompt_logprobs[slots] != NO_LOGPROBS) & ~is_verify
    is_scored &= committed_lens <= table.prompt_lens[slots]
    return Rows(
        slots=slots,
        starts=starts,
        counts=counts,
        is_verify=is_verify,
        draws=is_verify | (starts + counts == committed_lens),
        num_scored=np.where(is_scored, np.minimum(counts, committed_lens - starts - 1), 0),
    )


def drafts_of(drafts: Drafts, entries: Ints) -> Drafts:
    """Those of some verify entries, by ascending index; negative ones are no verify entries."""
    entries = entries[entries >= 0]
    if len(entries) == len(drafts.counts):
        return drafts
    is_wanted = np.zeros(len(drafts.counts), dtype=np.bool_)
    is_wanted[entries] = True
    of_node = np.repeat(is_wanted, drafts.counts)
    is_drawn = len(drafts.num_candidates) > 0
    of_candidate = np.repeat(of_node, np.repeat(drafts.num_candidates, drafts.counts)) if is_drawn else is_wanted[:0]
    return Drafts(
        counts=drafts.counts[entries],
        token_ids=drafts.token_ids[of_node],
        parents=drafts.parents[of_node] if len(drafts.parents) else drafts.parents,
        num_candidates=drafts.num_candidates[entries] if is_drawn else drafts.num_candidates,
        candidate_ids=drafts.candidate_ids[of_candidate],
        candidate_probs=drafts.candidate_probs[of_candidate],
    )
