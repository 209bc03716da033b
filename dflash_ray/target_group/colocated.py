"""The drafter inside rank 0. Its drafts are advice: whatever goes wrong here is logged, and decoding goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from dflash_ray.core.draft_blocks import DraftBlock
from dflash_ray.models.draft_contexts import DraftContexts, DraftMethod, to_block
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
    """

    def __init__(self, method: DraftMethod, max_context_tokens: int, raises: bool = False) -> None:
        self._method = method
        self._contexts: DraftContexts[int] = DraftContexts(method, max_context_tokens)
        self._raises = raises
        self.max_draft_tokens = method.max_draft_tokens

    def __len__(self) -> int:
        return len(self._contexts)

    def extend(self, table: SlotTable, features: StepFeatures) -> None:
        """Takes the features of a pass that was committed."""
        columns = (features.sequence_ids, features.starts, features.num_rows, features.first_rows)
        for sequence_id, start, count, first in zip(*(column.tolist() for column in columns), strict=True):
            with self._as_advice("the colocated drafter failed; a sequence is decoded without it"):
                token_ids = table.tokens[table.slot_of[sequence_id], start : start + count].tolist()
                self._contexts.extend(sequence_id, start, features.rows[first : first + count], token_ids)

    def close(self, sequence_id: int) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        with self._as_advice("the colocated drafter failed to close a session"):
            self._contexts.close(sequence_id)

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
    ) -> list[DraftBlock]:
        """At most so many tokens for each sequence that only lacks the anchor's row and whose context is whole."""
        slots = table.slots(sequence_ids)
        is_ready = (slots != NO_SLOT) & (counts > 0) & (table.kv_lens[slots] == table.committed_lens[slots] - 1)
        is_ready &= [self._contexts.context_len(at) for at in sequence_ids.tolist()] == table.kv_lens[slots]
        ready, slots = sequence_ids[is_ready].tolist(), slots[is_ready]
        lens = table.committed_lens[slots]
        if not ready:
            return []
        with self._as_advice("the colocated drafter failed; its sequences are decoded without it"):
            proposals = self._contexts.propose(
                ready,
                table.tokens[slots, lens - 1].tolist(),
                (counts if tree_width > 1 else np.minimum(counts, self.max_draft_tokens))[is_ready].tolist(),
                num_candidates,
                table.draws(slots.tolist()),
                tree_width,
            )
            return list(map(to_block, ready, lens.tolist(), proposals))
        return []
