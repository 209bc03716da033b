"""Blocks through a drafter in fixed numbers, over memory that stays, from inputs to drafts: a graph for each on a GPU.

A pass's inputs go to the device in one copy, and what was chosen comes back in one. Blocks that only fill a pass up
repeat its first one, and so write what it writes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dflash_ray.core.arrays import Ints, spans
from dflash_ray.kernels.attention import PlanMemory, Room, StepTables, plan_within, reaches
from dflash_ray.models.context_pages import PAGE_SIZE, ContextPages
from dflash_ray.models.context_passes import PoolGraphs
from dflash_ray.models.dflash import DflashConfig
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_choice import Choice, DraftChooser, DrawColumns, draw_values
from dflash_ray.models.draft_layers import DeviceLayers

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # blocks of a pass
_DTYPES = torch.int64, torch.float32, torch.int64, torch.float32  # of a Choice


class Blocks(NamedTuple):
    """N blocks behind the contexts of sessions [N], which have lens [N] rows, and how many slots each has."""

    sessions: Ints
    anchor_ids: Ints
    lens: Ints
    num_slots: int

    def size(self, is_causal: Sequence[bool], block_size: int) -> int:
        """Rows of each: those that are asked for where no layer looks at later ones, else as it was trained."""
        return 1 + self.num_slots if all(is_causal) else block_size

    def positions(self, size: int) -> Ints:
        """[N * size]: of all rows."""
        positions: Ints = (self.lens[:, None] + np.arange(size)).reshape(-1)
        return positions

    def token_ids(self, size: int, mask: int) -> Ints:
        """[N, size]: anchors and masks."""
        token_ids = np.full((len(self.lens), size), mask)
        token_ids[:, 0] = self.anchor_ids
        return token_ids


class HostChoice(NamedTuple):
    """A `Choice` on the host; candidates and scores where they are wanted."""

    ids: Ints
    log_probs: NDArray[np.float32]
    candidates: Ints
    scores: NDArray[np.float32]


class DraftPasses:
    """Passes of blocks of one size.

    Args:
        embedding: [V, H]; turns: cos and sin [P, d] of all positions.
        block: rows of a block.
        mask: token that stands in the slots.
    """

    def __init__(
        self,
        layers: DeviceLayers,
        chooser: DraftChooser,
        embedding: Tensor,
        turns: tuple[Tensor, Tensor],
        block: int,
        mask: int,
    ) -> None:
        self._layers, self._chooser, self._embedding, self._turns = layers, chooser, embedding, turns
        self._block, self._mask = block, mask
        self._buffers: dict[tuple[int, int], _Buffers] = {}
        self._graphs = PoolGraphs(embedding.device, "drafts")

    @torch.inference_mode()
    def __call__(
        self, blocks: Blocks, draws: Sequence[Draw], num_candidates: int, wants_scores: bool, pages: ContextPages
    ) -> HostChoice:
        """What is chosen for the slots of any number of blocks; without `wants_scores` no candidates and scores."""
        if len(blocks.lens) <= BUCKETS[-1]:
            return self._run(blocks, draws, num_candidates, wants_scores, pages)
        parts = []
        for first in range(0, len(blocks.lens), BUCKETS[-1]):
            cut = slice(first, first + BUCKETS[-1])
            part = Blocks(blocks.sessions[cut], blocks.anchor_ids[cut], blocks.lens[cut], blocks.num_slots)
            parts.append(self._run(part, draws[cut], num_candidates, wants_scores, pages))
        return HostChoice(*map(np.concatenate, zip(*parts, strict=True)))

    def _run(
        self, blocks: Blocks, draws: Sequence[Draw], num_candidates: int, wants_scores: bool, pages: ContextPages
    ) -> HostChoice:
        count, places = len(blocks.lens), pages.reserve_blocks(blocks.sessions, blocks.lens, self._block)
        bucket = next(bucket for bucket in BUCKETS if bucket >= count)
        shape = bucket, num_candidates
        if shape not in self._buffers:
            self._buffers[shape] = _Buffers(
                bucket, self._block, num_candidates, self._chooser.draws, self._embedding, len(self._turns[0])
            )
        buffers = self._buffers[shape]
        values = draw_values(draws) if self._chooser.draws else None
        reach = buffers.fill(blocks.token_ids(self._block, self._mask), blocks.lens, values, places)
        self._graphs.launch((*shape, reach), partial(self._pass, buffers, reach, pages), pages)
        return buffers.fetch(count, blocks.num_slots, wants_scores)

    def _pass(self, buffers: _Buffers, reach: int, pages: ContextPages) -> None:
        blocks = buffers.token_ids.view(-1, self._block)
        x = F.embedding(blocks, self._embedding)
        cos, sin = (table[buffers.positions] for table in self._turns)
        hidden = self._layers.run(x, cos, sin, pages, buffers.slots, buffers.attention[reach])
        firsts = buffers.positions.view_as(blocks)[:, 0] + 1
        draws = DrawColumns(buffers.inverse_temperatures, buffers.seeds, firsts) if self._chooser.draws else None
        buffers.keep(self._chooser(hidden[:, 1:], blocks[:, 0].contiguous(), draws, buffers.num_candidates))


def num_bytes(config: DflashConfig, vocab_size: int, num_positions: int, max_blocks: int, dtype: torch.dtype) -> int:
    """Bytes that the passes of up to so many blocks take on a device, with one candidate where there is no selector.

    Their buffers, and of the largest pass attention's sums and the logits, in their own type and in float32.
    """
    buckets = [bucket for at, bucket in enumerate(BUCKETS) if not at or BUCKETS[at - 1] < max_blocks]
    num_candidates = 1 if config.dflash2 is None else config.dflash2.selector_top_k
    buffers = 0
    for bucket in buckets:
        inputs = _num_columns(bucket, config.block_size) + _room(bucket, config.block_size, num_positions).size
        shapes = _shapes(bucket, config.block_size, num_candidates, config.dflash2 is not None)
        buffers += 8 * inputs + sum(map(_num_bytes, shapes, _DTYPES))
    sums = _room(buckets[-1], config.block_size, num_positions).sums_bytes(config.num_attention_heads, config.head_dim)
    logits = buckets[-1] * (config.block_size - 1) * vocab_size * (dtype.itemsize + 4)
    return buffers + sums + logits


def _room(num_blocks: int, block: int, num_positions: int) -> Room:
    return Room(num_blocks * block, num_blocks, num_blocks * -(-num_positions // PAGE_SIZE), num_positions)


def _num_columns(num_blocks: int, block: int) -> int:
    """Values of the inputs in front of what attention reads."""
    return 3 * num_blocks * block + 2 * num_blocks


def _shapes(num_blocks: int, block: int, num_candidates: int, has_scores: bool) -> list[tuple[int, ...]]:
    """Of a Choice."""
    slots = (num_blocks, block - 1, num_candidates)
    return [slots, slots, slots if has_scores else (0,), (*slots, num_candidates) if has_scores else (0,)]


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of one of its parts, so that the next one may be of any type."""
    return -(-math.prod(shape) * dtype.itemsize // 8) * 8


class _Buffers:
    """Those of passes of N blocks.

    Attributes:
        token_ids, positions, slots: int64 [N * block].
        inverse_temperatures, seeds: float64 and int64 [N].
        attention: plans by their reach.
    """

    def __init__(
        self,
        num_blocks: int,
        block: int,
        num_candidates: int,
        has_scores: bool,
        embedding: Tensor,
        num_positions: int,
    ) -> None:
        self._num_blocks, self._block, self.num_candidates = num_blocks, block, num_candidates
        rows, device = num_blocks * block, embedding.device
        room = _room(num_blocks, block, num_positions)
        is_cuda = device.type == "cuda"
        self._num_columns = _num_columns(num_blocks, block)
        self._memory = torch.zeros(self._num_columns + room.size, dtype=torch.int64, device=device)
        self._host = torch.zeros(len(self._memory), dtype=torch.int64, pin_memory=is_cuda)
        self._event = torch.cuda.Event() if is_cuda else None
        self.token_ids, self.positions, self.slots = self._memory[: 3 * rows].view(3, rows)
        draws = self._memory[3 * rows : self._num_columns].view(2, num_blocks)
        self.inverse_temperatures, self.seeds = draws[0].view(torch.float64), draws[1]
        memory = PlanMemory(self._host.numpy()[self._num_columns :], self._memory[self._num_columns :])
        self.attention = {
            reach: plan_within(room._replace(max_len=reach), self.slots, PAGE_SIZE, memory)
            for reach in reaches(num_positions)
        }
        shapes = _shapes(num_blocks, block, num_candidates, has_scores)
        sizes = list(map(_num_bytes, shapes, _DTYPES))
        ends = list(itertools.accumulate(sizes, initial=0))
        self._num_plain = ends[2]
        places = list(zip(itertools.pairwise(ends), _DTYPES, shapes, strict=True))
        self._chosen = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
        self._fetched = torch.zeros(ends[-1], dtype=torch.uint8, pin_memory=is_cuda)
        self._choice, self._fetched_choice = (
            [
                memory[begin:end][: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                for (begin, end), dtype, shape in places
            ]
            for memory in (self._chosen, self._fetched)
        )

    def fill(
        self,
        token_ids: Ints,
        lens: Ints,
        draws: tuple[NDArray[np.float64], Ints] | None,
        places: tuple[Ints, Ints, Ints, Ints, Ints],
    ) -> int:
        """Takes a pass's blocks to the device in one copy. Returns the reach of the plan that they fit.

        Args:
            draws: inverse_temperatures and seeds, for a chooser that looks at them.
            places: as `ContextPages.reserve_blocks` has them.
        """
        at = np.zeros(self._num_blocks, dtype=np.int64)  # the block that each is
        at[: len(lens)] = np.arange(len(lens))
        slots, _, _, page_counts, pages = places
        host, rows = self._host.numpy(), 3 * len(self.slots)
        head = host[:rows].reshape(3, self._num_blocks, self._block)
        head[0], head[1] = token_ids[at], lens[at, None] + np.arange(self._block)
        head[2] = slots.reshape(-1, self._block)[at]
        if draws is not None:
            drawn = host[rows : self._num_columns].reshape(2, self._num_blocks)
            drawn[0], drawn[1] = draws[0].view(np.int64)[at], draws[1][at]
        counts = page_counts[at]
        tables = StepTables(
            entry_lens=np.full(self._num_blocks, self._block),
            context_lens=lens[at],
            page_counts=counts,
            pages=pages[spans((np.cumsum(page_counts) - page_counts)[at], counts)],
            parents=np.zeros(0, dtype=np.int64),
        )
        reach = next(reach for reach in self.attention if reach >= int(lens.max()) + self._block)
        end = self._num_columns + self.attention[reach].refill(tables)
        self._memory[:end].copy_(self._host[:end], non_blocking=True)
        return reach

    def keep(self, choice: Choice) -> None:
        """Puts what was chosen where it is fetched from."""
        for mine, chosen in zip(self._choice, choice, strict=True):
            mine.copy_(chosen)

    def fetch(self, count: int, num_slots: int, wants_scores: bool) -> HostChoice:
        """What was chosen for the first slots of the first blocks, in one copy, when it is there."""
        end = len(self._chosen) if wants_scores else self._num_plain
        self._fetched[:end].copy_(self._chosen[:end], non_blocking=True)
        if self._event is not None:
            self._event.record()
            self._event.synchronize()  # what was filled has been read then as well
        ids, log_probs, *edges = (part.numpy() for part in self._fetched_choice)
        kept = slice(count), slice(num_slots)
        candidates, scores = (part[kept].copy() if wants_scores and part.ndim > 1 else part[:0] for part in edges)
        return HostChoice(ids[kept].copy(), log_probs[kept].copy(), candidates, scores)
