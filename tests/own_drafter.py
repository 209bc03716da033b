"""A drafter inside an engine that knows what comes, and is wrong as often as it is told."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from dflash_ray.core.draft_blocks import BlockColumns, DraftBlock, to_message
from dflash_ray.target_group.colocated import ColocatedDrafter
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.own_drafts import OwnDrafts
from dflash_ray.target_group.slots import NO_SLOT, SlotTable
from dflash_ray.target_group.step import EntryStatus, Ids, Ints, Opening, StepFeatures, StepInput, StepOutput
from tests.steps import VOCAB, step_of, tokens_of
from tests.trees import random_tree


class Guessing(ColocatedDrafter):
    """Drafts without a model.

    Args:
        truth: whole texts, prompts included, by sequence id.
        rate: chance that a token of a chain is right.
        is_drawn: drafts say that they were drawn, from three candidates each.
    """

    def __init__(self, truth: Mapping[int, Sequence[int]], rate: float = 0.7, is_drawn: bool = False) -> None:
        self.own = OwnDrafts()
        self._truth, self._rate, self._is_drawn = truth, rate, is_drawn

    def __len__(self) -> int:
        return len(self._truth)

    def extend(self, table: SlotTable, features: StepFeatures) -> None:
        pass

    def close(self, slots: list[int]) -> None:
        self.own.forget(slots)

    def draft(
        self, table: SlotTable, sequence_ids: Ids, counts: Ints, num_candidates: int, tree_width: int = 1
    ) -> BlockColumns:
        slots = table.slots(sequence_ids)
        is_ready = (slots != NO_SLOT) & (table.kv_lens[slots] == table.committed_lens[slots] - 1)
        is_ready &= ~table.is_over[slots]
        blocks = [
            self.block(sequence_id, int(table.committed_lens[slot]), count, tree_width)
            for sequence_id, slot, count in zip(
                sequence_ids[is_ready].tolist(), slots[is_ready].tolist(), counts[is_ready].tolist(), strict=True
            )
        ]
        columns = BlockColumns.of(to_message(0, blocks))
        self.own.keep(slots[is_ready], columns)
        return columns

    def block(self, sequence_id: int, length: int, count: int, tree_width: int) -> DraftBlock:
        rng = random.Random(sequence_id * 1000 + length)
        coming = list(self._truth[sequence_id][length : length + count])
        tokens = [token if rng.random() < self._rate else rng.randrange(VOCAB) for token in coming]
        parents = None
        if tree_width > 1:
            tokens, nodes = random_tree(rng, coming, count)
            parents = np.array(nodes, dtype=np.int64)
        ids = np.array(tokens, dtype=np.uint32).reshape(-1, 1)
        if self._is_drawn:
            ids = (ids + np.array([0, 1, 2], dtype=np.uint32)) % VOCAB
            probs = np.tile(np.log([0.5, 0.3, 0.2]).astype(np.float32), (len(ids), 1))
            return DraftBlock(sequence_id, length, ids, probs, is_drawn=True)
        return DraftBlock(sequence_id, length, ids, np.full(ids.shape, -0.5, dtype=np.float32), parents=parents)


def run_ahead(
    engine: Engine, openings: Sequence[Opening], num_drafts: int = 4, **options: object
) -> tuple[dict[int, list[int]], int]:
    """Sequences to their ends, each step made before the result of the one before it is known.

    Returns the new tokens, and how many drafts were accepted.
    """
    known = {one.sequence_id: one.token_ids.tolist() for one in openings}
    prompts = {at: len(tokens) for at, tokens in known.items()}
    running = set(known)
    num_accepted = 0

    def next_step(is_ahead: bool) -> StepInput:
        wanted = dict.fromkeys(sorted(running), num_drafts)
        verify = {at: (len(known[at]), []) for at in wanted}
        return step_of(verify=verify, own=wanted, draft=wanted, options=options | {"is_ahead": is_ahead})

    def take(output: StepOutput) -> None:
        nonlocal num_accepted
        for at, status in zip(output.sequence_ids.tolist(), output.statuses.tolist(), strict=True):
            assert status == (EntryStatus.OK if at in running else EntryStatus.ENDED), (at, status, output.errors)
        for at, new in tokens_of(output).items():
            known[at] += new
        num_accepted += int(output.num_accepted.sum())
        running.difference_update(output.sequence_ids[output.finishes > 0].tolist())

    take(engine.step(step_of(openings, prompts, draft=dict.fromkeys(known, num_drafts), options=options)))
    step = next_step(is_ahead=False)
    while running:
        following = next_step(is_ahead=True)
        take(engine.step(step))
        step = following
    take(engine.step(step))
    engine.close(list(known))
    return {at: tokens[prompts[at] :] for at, tokens in known.items()}, num_accepted
