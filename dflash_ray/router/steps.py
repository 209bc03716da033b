"""How the rows of one target pass are shared out, and the message that says so. Sans-IO, a part of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dflash_ray.config import RouterConfig
from dflash_ray.core.arrays import Flags, Ints, packed
from dflash_ray.pb import target_pb2
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.slot_table import CHAIN, COLOCATED, SlotTable

_PREFILL_SHARE = 4  # one row in so many is prompts' where prompts wait


@dataclass(slots=True)
class StepInFlight:
    """A step that was sent, and its entries in the order of the result: prompts' chunks, then chains and trees.

    Attributes:
        slots, ids: of the entries; a slot may be another sequence's by now.
        num_chunks: how many entries are prompts' chunks.
        rows: of a chunk; 0 for chains.
        num_drafts: of a chain, of own ones at most; 0 for chunks.
        is_own: the drafts are the group's own drafter's.
        num_rows_of_drafts, num_rows_of_chunks: of all together.
        asks_logprobs: whether log-probabilities come with an entry's tokens; None where they do with nobody's.
        is_alone: it has a suspect, and no other step may be in flight with it.
        num_left: the table's when it was sent: while that is the same, no entry has left it.
    """

    step_id: int
    slots: Ints
    ids: Ints
    num_chunks: int
    rows: Ints
    num_drafts: Ints
    is_own: Flags
    num_rows_of_drafts: int
    num_rows_of_chunks: int
    asks_logprobs: Flags | None
    is_alone: bool
    num_left: int

    @property
    def chains(self) -> Ints:
        """The slots of its chains and trees."""
        return self.slots[self.num_chunks :] if self.num_chunks else self.slots

    @property
    def brings_drafts(self) -> bool:
        """Whether some of its drafts are not own ones."""
        return self.num_rows_of_drafts > 0 and bool(np.count_nonzero(self.num_drafts[~self.is_own]))

    @property
    def num_rows(self) -> int:
        """Rows of the pass."""
        return self.num_rows_of_chunks + self.num_rows_of_drafts + len(self.ids) - self.num_chunks

    def is_current(self, table: SlotTable) -> Flags:
        """Which entries are still in it: a sequence that ended or was put back since then is not."""
        if table.num_left == self.num_left:
            return np.ones(len(self.slots), np.bool_)
        is_current: Flags = (table.ids[self.slots] == self.ids) & (table.step_ids[self.slots] == self.step_id)
        return is_current


def build_step(
    step_id: int,
    limits: TargetLimits,
    config: RouterConfig,
    table: SlotTable,
    decoding: Ints,
    prefilling: Ints,
    most_drafts: Ints,
    *,
    is_alone: bool,
    least_own_log_prob: float = 0.0,
) -> tuple[target_pb2.Step, StepInFlight]:
    """A step of chains and prompts' chunks; who was left out of the last ones comes first.

    `most_drafts` [len(decoding)] is how many of their drafts are to be verified. Drafts that find no room are cut off.
    The entries count as sent. Where chains are in a step already, all are in that one and count on what it brings.
    """
    step = target_pb2.Step(
        step_id=step_id, epoch=limits.epoch, tree_width=config.tree_width, least_own_log_prob=least_own_log_prob
    )
    reserved = min(config.prefill_chunk_tokens, limits.max_batch_tokens // _PREFILL_SHARE) if len(prefilling) else 0
    chains, counts, num_drafts = decoding, most_drafts, 0
    if np.count_nonzero(most_drafts):
        counts = np.minimum(np.maximum(table.draft_lens[decoding], 0), most_drafts)
        num_drafts = int(counts.sum())
    if len(counts) + num_drafts > limits.max_batch_tokens - reserved:
        first = np.lexsort((table.turns[decoding], table.last_steps[decoding]))
        counts = draft_rows(counts[first], limits.max_batch_tokens - reserved)
        chains, num_drafts = decoding[first][: len(counts)], int(counts.sum())
    step.is_ahead = is_ahead = len(chains) > 0 and bool(table.step_ids[chains[0]])
    is_own = np.zeros(len(chains), np.bool_)
    if num_drafts:
        is_own = (table.draft_sources[chains] == COLOCATED) & (counts > 0)
    ids, is_asking = table.ids[chains], table.asks_logprobs[chains]
    _add_chains(step, table, chains, ids, counts, is_own)
    if num_drafts:
        _add_drafts(step, table, chains, np.where(is_own, 0, counts))
    slots, rows, num_chunks, num_rows_of_chunks = chains, np.zeros(len(chains), np.int64), 0, 0
    if len(prefilling):
        chunks, chunk_rows = _chunks(config, table, prefilling, limits.max_batch_tokens - len(counts) - num_drafts)
        _add_chunks(step, limits, table, chunks, chunk_rows)
        num_chunks, num_rows_of_chunks = len(chunks), int(chunk_rows.sum())
        slots, rows = np.concatenate((chunks, chains)), np.concatenate((chunk_rows, rows))
        ids, is_asking = table.ids[slots], table.asks_logprobs[slots]
        counts = np.concatenate((np.zeros(num_chunks, np.int64), counts))
        is_own = np.concatenate((np.zeros(num_chunks, np.bool_), is_own))
    table.last_steps[slots] = step_id
    if is_ahead:
        table.ahead_ids[chains] = step_id
        table.step_ids[slots[:num_chunks]] = step_id
    else:
        table.step_ids[slots] = step_id
    return step, StepInFlight(
        step_id,
        slots,
        ids,
        num_chunks,
        rows,
        counts,
        is_own,
        num_drafts,
        num_rows_of_chunks,
        is_asking if np.count_nonzero(is_asking) else None,
        is_alone,
        table.num_left,
    )


def add_colocated(step: target_pb2.Step, table: SlotTable, slots: Ints, num_drafts: Ints) -> None:
    """Asks the colocated drafter for num_drafts[i] drafts of slots[i] behind the pass."""
    table.num_own[slots] = num_drafts
    if not np.count_nonzero(num_drafts):
        return
    is_asked = num_drafts > 0
    step.colocated_draft_ids.extend(table.ids[slots[is_asked]].tolist())
    step.colocated_num_drafts.extend(num_drafts[is_asked].tolist())


def draft_rows(wanted: Ints, room: int) -> Ints:
    """Drafts of each chain: all get an anchor's row before any gets a draft's. A chain without a row has no count."""
    chains = wanted[:room]
    before = chains.cumsum() - chains
    return np.clip(room - len(chains) - before, 0, chains)


def _add_chains(step: target_pb2.Step, table: SlotTable, slots: Ints, ids: Ints, counts: Ints, is_own: Flags) -> None:
    """Adds verify entries with counts[i] drafts of slots[i]; is_own[i]: the target has them."""
    table.draft_lens[slots] = counts
    step.verify_ids.extend(ids.tolist())
    step.base_lens.extend(table.committed_lens[slots].tolist())
    if np.count_nonzero(is_own):
        step.num_own_drafts.extend(np.where(is_own, counts, 0).tolist())
        counts = np.where(is_own, 0, counts)
    step.num_drafts.extend(counts.tolist())


def _add_drafts(step: target_pb2.Step, table: SlotTable, slots: Ints, counts: Ints) -> None:
    """Adds the first counts[i] of the drafts of slots[i]."""
    is_sent = counts[:, None] > CHAIN
    step.draft_token_ids = packed(table.drafts[slots][is_sent])
    if table.has_trees:
        parents = table.draft_parents[slots]
        if (parents != CHAIN)[is_sent].any():
            step.draft_parents.extend(parents[is_sent].tolist())
    if not table.drawn:
        return
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        drawn = table.drawn.get(slot)
        step.num_draft_candidates.append(0 if drawn is None else drawn.candidate_ids.shape[1])
        if drawn is not None:
            step.draft_candidate_ids.extend(drawn.candidate_ids[:count].ravel().tolist())
            step.draft_log_probs.extend(drawn.log_probs[:count].ravel().tolist())


def _chunks(config: RouterConfig, table: SlotTable, prefilling: Ints, room: int) -> tuple[Ints, Ints]:
    """Prompts that find rows, and how many each."""
    first = np.lexsort((table.turns[prefilling], table.last_steps[prefilling]))
    slots = prefilling[first]
    wanted = np.minimum(table.committed_lens[slots] - table.num_prefilled[slots], config.prefill_chunk_tokens)
    rows = np.clip(room - (wanted.cumsum() - wanted), 0, wanted)
    return slots[rows > 0], rows[rows > 0]


def _add_chunks(step: target_pb2.Step, limits: TargetLimits, table: SlotTable, slots: Ints, rows: Ints) -> None:
    """Adds the next rows of prompts; the first chunk brings the whole sequence."""
    for slot in slots[~table.is_open[slots]].tolist():
        sequence = table.sequence(slot)
        step.open.append(sequence.open_message(limits.has_drafter and bool(table.may_be_drafted[slot])))
    table.is_open[slots] = True
    step.prefill_ids.extend(table.ids[slots].tolist())
    step.prefill_lens.extend(rows.tolist())
