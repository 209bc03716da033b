"""The drafter inside rank 0. Its drafts are advice: whatever goes wrong here is logged, and decoding goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Columns
from contextlib import contextmanager

from torch import Tensor

from dflash_ray.core.draft_blocks import DraftBlock
from dflash_ray.models.draft_contexts import DraftContexts, DraftMethod, to_block
from dflash_ray.target_group.sequences import Sequence

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

    def extend(self, sequence_id: int, start: int, features: Tensor, token_ids: Columns[int]) -> None:
        """Features [n, H] and tokens of positions start, start + 1, ..."""
        with self._as_advice("the colocated drafter failed; a sequence is decoded without it"):
            self._contexts.extend(sequence_id, start, features, token_ids)

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

    def draft(self, sequences: Columns[Sequence], counts: Columns[int], num_candidates: int) -> list[DraftBlock]:
        """Blocks for those of `sequences` that only lack the anchor's row and whose context is whole."""
        ready = [
            (sequence, min(count, self.max_draft_tokens))
            for sequence, count in zip(sequences, counts, strict=True)
            if count
            and sequence.kv_len == sequence.committed_len - 1
            and self._contexts.context_len(sequence.sequence_id) == sequence.kv_len
        ]
        if not ready:
            return []
        blocks: list[DraftBlock] = []
        with self._as_advice("the colocated drafter failed; its sequences are decoded without it"):
            proposals = self._contexts.propose(
                [sequence.sequence_id for sequence, _ in ready],
                [sequence.tokens[-1] for sequence, _ in ready],
                [count for _, count in ready],
                num_candidates,
                [sequence.draw() for sequence, _ in ready],
            )
            for (sequence, _), proposal in zip(ready, proposals, strict=True):
                blocks.append(to_block(sequence.sequence_id, sequence.committed_len, proposal))
        return blocks
