"""Draft blocks as arrays, and as the columns in which they travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dflash_ray.pb import common_pb2

_IDS, _LOG_PROBS = np.dtype("<u4"), np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """Candidates for the positions committed_len, committed_len + 1, ... of a sequence.

    Attributes:
        candidate_ids: uint32 [n, k]; the first of a slot is the draft, the others follow by falling probability.
        log_probs: float32 [n, k], the drafter's own.
        is_drawn: every draft was drawn from these, and they are of all candidates that had a chance.
    """

    sequence_id: int
    committed_len: int
    candidate_ids: NDArray[np.uint32]
    log_probs: NDArray[np.float32]
    is_drawn: bool = False

    @property
    def draft_ids(self) -> list[int]:
        """The draft of each slot."""
        return self.candidate_ids[:, 0].tolist() if self.candidate_ids.size else []


def to_message(epoch: int, blocks: Sequence[DraftBlock]) -> common_pb2.DraftBlocks:
    """Blocks for the wire."""
    shapes = [block.candidate_ids.shape for block in blocks]
    return common_pb2.DraftBlocks(
        epoch=epoch,
        sequence_ids=[block.sequence_id for block in blocks],
        committed_lens=[block.committed_len for block in blocks],
        num_slots=[shape[0] for shape in shapes],
        num_candidates=[shape[1] for shape in shapes],
        candidate_ids=_joined([block.candidate_ids for block in blocks], _IDS),
        log_probs=_joined([block.log_probs for block in blocks], _LOG_PROBS),
        is_drawn=[block.is_drawn for block in blocks],
    )


def _joined(parts: list[NDArray[np.generic]], dtype: np.dtype[np.generic]) -> bytes:
    return np.concatenate([part.ravel() for part in parts]).astype(dtype, copy=False).tobytes() if parts else b""


def blocks_of(message: common_pb2.DraftBlocks) -> Iterator[DraftBlock]:
    """A message's blocks, views of its bytes. Raises ValueError when its columns do not belong together."""
    count = len(message.sequence_ids)
    for name in ("committed_lens", "num_slots", "num_candidates", "is_drawn"):
        if len(getattr(message, name)) != count:
            raise ValueError(f"blocks: {name} has {len(getattr(message, name))} elements for {count} sequence_ids")
    total = sum(slots * size for slots, size in zip(message.num_slots, message.num_candidates, strict=True))
    for name, dtype in (("candidate_ids", _IDS), ("log_probs", _LOG_PROBS)):
        if len(getattr(message, name)) != total * dtype.itemsize:
            raise ValueError(f"blocks: {name} has {len(getattr(message, name))} bytes for {total} candidates")
    ids = np.frombuffer(message.candidate_ids, dtype=_IDS)
    log_probs = np.frombuffer(message.log_probs, dtype=_LOG_PROBS)
    at = 0
    columns = (
        message.sequence_ids, message.committed_lens, message.num_slots, message.num_candidates, message.is_drawn
    )  # fmt: skip
    for sequence_id, committed_len, num_slots, num_candidates, is_drawn in zip(*columns, strict=True):
        shape, stop = (num_slots, num_candidates), at + num_slots * num_candidates
        yield DraftBlock(
            sequence_id, committed_len, ids[at:stop].reshape(shape), log_probs[at:stop].reshape(shape), is_drawn
        )
        at = stop
