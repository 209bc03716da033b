"""Draft blocks as arrays, and as the columns in which they travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_ray.core.arrays import Flags, Ints, Tokens, column
from dflash_ray.pb import common_pb2

# Of each block; the last two may be empty, as they mostly say the same of all.
_COLUMNS = ("committed_lens", "num_slots", "num_candidates", "is_drawn")
_USUAL = {"num_candidates": 1, "is_drawn": 0}
_IDS, _LOG_PROBS = np.dtype("<u4"), np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """Candidates for the positions committed_len, committed_len + 1, ... of a sequence.

    Attributes:
        candidate_ids: uint32 [n, k]; the first of a slot is the draft, the others follow by falling probability.
        log_probs: float32 [n, k], the drafter's own.
        is_drawn: every draft was drawn from these, and they are of all candidates that had a chance.
        parents: [n] where the slots are nodes of a tree, likelier ones first: 0 is the anchor, k the k-th node. Each
            has one candidate then, whose log-probability is given its parent. None for a chain.
    """

    sequence_id: int
    committed_len: int
    candidate_ids: NDArray[np.uint32]
    log_probs: NDArray[np.float32]
    is_drawn: bool = False
    parents: NDArray[np.integer[Any]] | None = None

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
        parents=_packed_parents([block.parents for block in blocks], [shape[0] for shape in shapes]),
    )


def _packed_parents(parents: Sequence[Any], num_slots: Sequence[int]) -> bytes:
    """The column of blocks, of which chains have None; no bytes when all are chains."""
    if all(one is None for one in parents):
        return b""
    columns = [np.arange(n) if one is None else np.asarray(one) for one, n in zip(parents, num_slots, strict=True)]
    return np.concatenate(columns).astype(_IDS).tobytes()


def _column_of(message: common_pb2.DraftBlocks, name: str, count: int) -> Ints:
    values = getattr(message, name)
    return np.full(count, _USUAL[name]) if name in _USUAL and not values else column(values)


def _joined(parts: list[NDArray[np.generic]], dtype: np.dtype[np.generic]) -> bytes:
    return np.concatenate([part.ravel() for part in parts]).astype(dtype, copy=False).tobytes() if parts else b""


@dataclass(frozen=True, slots=True)
class BlockColumns:
    """The blocks of a message, columns [num_blocks] unless said.

    Attributes:
        starts: of each block in candidate_ids and log_probs.
        candidate_ids, log_probs: [num_slots[i], num_candidates[i]] of every block, one after the other.
        parents: [num_slots[i]] of every block, one after the other; empty when all are chains.
    """

    sequence_ids: Ints
    committed_lens: Ints
    num_slots: Ints
    num_candidates: Ints
    is_drawn: Flags
    starts: Ints
    candidate_ids: Tokens
    log_probs: NDArray[np.float32]
    parents: Tokens

    @staticmethod
    @cache
    def none() -> BlockColumns:
        """No blocks."""
        return BlockColumns.of(common_pb2.DraftBlocks())

    @classmethod
    def of(cls, message: common_pb2.DraftBlocks) -> BlockColumns:
        """Views of a message's bytes. Raises ValueError when its columns do not belong together."""
        sequence_ids = column(message.sequence_ids)
        count = len(sequence_ids)
        columns = [_column_of(message, name, count) for name in _COLUMNS]
        for name, values in zip(_COLUMNS, columns, strict=True):
            if len(values) != count:
                raise ValueError(f"blocks: {name} has {len(values)} elements for {count} sequence_ids")
        committed_lens, num_slots, num_candidates, is_drawn = columns
        sizes = num_slots * num_candidates
        ends = sizes.cumsum()
        total = int(ends[-1]) if count else 0
        candidate_ids, log_probs = message.candidate_ids, message.log_probs
        for name, data in (("candidate_ids", candidate_ids), ("log_probs", log_probs)):
            if len(data) != total * _IDS.itemsize:
                raise ValueError(f"blocks: {name} has {len(data)} bytes for {total} candidates")
        if np.count_nonzero((num_candidates == 0) & (num_slots > 0)):
            raise ValueError("blocks: num_candidates must not be 0 where there are slots")
        if message.parents and len(message.parents) != int(num_slots.sum()) * _IDS.itemsize:
            raise ValueError(f"blocks: parents has {len(message.parents)} bytes for {int(num_slots.sum())} slots")
        return cls(
            sequence_ids,
            committed_lens,
            num_slots,
            num_candidates,
            is_drawn > 0,
            ends - sizes,
            np.frombuffer(candidate_ids, dtype=_IDS),
            np.frombuffer(log_probs, dtype=_LOG_PROBS),
            np.frombuffer(message.parents, dtype=_IDS),
        )

    def message(self, epoch: int) -> common_pb2.DraftBlocks:
        """The blocks for the wire."""
        has_one_candidate = np.count_nonzero(self.num_candidates != 1) == 0
        return common_pb2.DraftBlocks(
            epoch=epoch,
            sequence_ids=self.sequence_ids.tolist(),
            committed_lens=self.committed_lens.tolist(),
            num_slots=self.num_slots.tolist(),
            num_candidates=() if has_one_candidate else self.num_candidates.tolist(),
            candidate_ids=self.candidate_ids.astype(_IDS, copy=False).tobytes(),
            log_probs=self.log_probs.astype(_LOG_PROBS, copy=False).tobytes(),
            is_drawn=self.is_drawn.tolist() if np.count_nonzero(self.is_drawn) else (),
            parents=self.parents.astype(_IDS, copy=False).tobytes(),
        )

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def __iter__(self) -> Iterator[DraftBlock]:
        return map(self.block, range(len(self)))

    def draft_places(self, blocks: Ints, width: int) -> tuple[Ints, Flags]:
        """Where blocks have their drafts in candidate_ids and log_probs, and which there are; [len(blocks), width]."""
        slots = np.arange(width)
        is_there: Flags = slots < self.num_slots[blocks][:, None]
        places: Ints = self.starts[blocks][:, None] + slots * self.num_candidates[blocks][:, None]
        places[~is_there] = 0
        return places, is_there

    def parents_of(self, blocks: Ints, width: int) -> Ints:
        """The parents [len(blocks), width] of blocks' drafts, those of a chain behind their ends."""
        chain = np.arange(width)
        if not len(self.parents):
            return np.broadcast_to(chain, (len(blocks), width))
        firsts = (self.num_slots.cumsum() - self.num_slots)[blocks][:, None]
        is_there = chain < self.num_slots[blocks][:, None]
        parents: Ints = np.where(is_there, self.parents[np.where(is_there, firsts + chain, 0)], chain)
        return parents

    def block(self, i: int) -> DraftBlock:
        """One of them."""
        shape = int(self.num_slots[i]), int(self.num_candidates[i])
        of_block = slice(self.starts[i], self.starts[i] + shape[0] * shape[1])
        return DraftBlock(
            int(self.sequence_ids[i]),
            int(self.committed_lens[i]),
            self.candidate_ids[of_block].reshape(shape),
            self.log_probs[of_block].reshape(shape),
            bool(self.is_drawn[i]),
            self.parents_of(np.array([i]), shape[0])[0] if len(self.parents) else None,
        )
