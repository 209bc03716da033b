"""The drafter inside rank 0. Its drafts are advice: whatever goes wrong here is logged, and decoding goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from dflash_ray.core.arrays import spans
from dflash_ray.core.draft_blocks import BlockColumns
from dflash_ray.models.context_features import select_rows
from dflash_ray.models.draft_contexts import ContextRows, DraftContexts, DraftMethod
from dflash_ray.target_group.own_drafts import OwnDrafts
from dflash_ray.target_group.slots import NO_SLOT, SlotTable
from dflash_ray.target_group.step import Ids, Ints, StepFeatures

logger = logging.getLogger(__name__)


class ColocatedDrafter:
    """Contexts of the engine's sequences and drafts for them.

    Features are not kept here for a second time: a sequence whose rows found no room, or whose session was lost to a
    fault, is decoded without drafts until it is opened again.

    Args:
        max_context_tokens: context rows held over all sequences.
        raises: whether faults end the step, as a job wants that measures drafts.

    Attributes:
        own: what was drafted last, for the step that verifies it.
    """

    def __init__(self, method: DraftMethod, max_context_tokens: int, raises: bool = False) -> None:
        self._method = method
        self._contexts: DraftContexts = DraftContexts(method, max_context_tokens)
        self._raises = raises
        self.own = OwnDrafts()
        self.max_draft_tokens = method.max_draft_tokens

    def __len__(self) -> int:
        return len(self._contexts)

    def extend(self, table: SlotTable, features: StepFeatures) -> None:
        """Takes the features of a pass that was committed."""
        slots, starts, counts = table.slots(features.sequence_ids), features.starts, features.num_rows
        kept = counts > 0
        slots, starts, counts, firsts = slots[kept], starts[kept], counts[kept], features.first_rows[kept]
        if not len(slots):
            return
        rows = spans(firsts, counts)
        if self._method.feature_width:
            columns = ContextRows(slots, starts, counts, features=select_rows(features.rows, rows))
        else:
            token_ids = table.tokens[np.repeat(slots, counts), spans(starts, counts)]
            columns = ContextRows(slots, starts, counts, token_ids=token_ids.astype(np.int64))
        with self._as_advice("the colocated drafter failed; its sequences are decoded without it"):
            faults = self._contexts.extend(columns).values()
            for fault in faults:
                if isinstance(fault, Exception):
                    raise fault

    def close(self, slots: list[int]) -> None:
        """Forgets sequences, before others get their slots; unknown ones are ignored."""
        self.own.forget(slots)
        with self._as_advice("the colocated drafter failed to close a session"):
            self._contexts.close(slots)

    @contextmanager
    def _as_advice(self, fault: str) -> Iterator[None]:
        """What goes wrong inside is logged as `fault`, and decoding goes on."""
        try:
            yield
        except Exception:
            if self._raises:
                raise
            logger.exception(fault)

    def draft(
        self, table: SlotTable, sequence_ids: Ids, counts: Ints, num_candidates: int, tree_width: int = 1
    ) -> BlockColumns:
        """At most so many tokens for each sequence that only lacks the anchor's row and whose context is whole.

        They are kept as well, for the step that verifies them.
        """
        slots = table.slots(sequence_ids)
        is_ready = (slots != NO_SLOT) & (counts > 0) & (table.kv_lens[slots] == table.committed_lens[slots] - 1)
        is_ready &= ~table.is_over[slots]
        is_ready[is_ready] &= self._contexts.context_lens(slots[is_ready]) == table.kv_lens[slots[is_ready]]
        if not is_ready.any():
            return BlockColumns.none()
        slots, lens = slots[is_ready], table.committed_lens[slots[is_ready]]
        with self._as_advice("the colocated drafter failed; its sequences are decoded without it"):
            proposals = self._contexts.propose(
                slots.tolist(),
                table.tokens[slots, lens - 1].tolist(),
                (counts if tree_width > 1 else np.minimum(counts, self.max_draft_tokens))[is_ready].tolist(),
                num_candidates,
                table.draws(slots.tolist()),
                tree_width,
            )
            blocks = proposals.blocks(sequence_ids[is_ready].astype(np.int64), lens)
            self.own.keep(slots, blocks)
            return blocks
        return BlockColumns.none()
