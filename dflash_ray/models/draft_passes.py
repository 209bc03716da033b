"""Blocks through a drafter's layers in fixed numbers, over memory that stays: a graph for each on a GPU.

A pass's inputs go to the device in one copy. Blocks that only fill a pass up repeat its first one, and so write what it
writes. The pool of context pages may move when it grows: then graphs are captured anew, each when it is wanted next.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_ray.core.arrays import Ints, spans
from dflash_ray.kernels.attention import PlanMemory, Room, StepTables, plan_within, reaches
from dflash_ray.kernels.graphs import Graphs
from dflash_ray.models.context_pages import PAGE_SIZE, ContextPages
from dflash_ray.models.draft_layers import DeviceLayers

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # blocks of a pass


class DraftPasses:
    """Passes of blocks of one size.

    Args:
        embedding: [V, H]; cos, sin: [P, d] of all positions.
        block: rows of a block.
    """

    def __init__(self, layers: DeviceLayers, embedding: Tensor, cos: Tensor, sin: Tensor, block: int) -> None:
        self._layers, self._embedding, self._cos, self._sin = layers, embedding, cos, sin
        self._block = block
        self._buffers: dict[int, _Buffers] = {}
        self._graphs = Graphs(embedding.device)
        self._pool = 0  # where the pages of the graphs are

    @torch.inference_mode()
    def __call__(self, token_ids: Ints, sessions: Ints, lens: Ints, pages: ContextPages) -> Tensor:
        """Rows [N, block, H] of blocks token_ids [N, block] behind the sessions' contexts of lens [N] rows."""
        parts = []
        for first in range(0, len(token_ids), BUCKETS[-1]):
            blocks = slice(first, first + BUCKETS[-1])
            parts.append(self._run(token_ids[blocks], sessions[blocks], lens[blocks], pages))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, token_ids: Ints, sessions: Ints, lens: Ints, pages: ContextPages) -> Tensor:
        count, places = len(token_ids), pages.reserve_blocks(sessions, lens, self._block)
        bucket = next(bucket for bucket in BUCKETS if bucket >= count)
        if bucket not in self._buffers:
            self._buffers[bucket] = _Buffers(bucket, self._block, self._embedding, len(self._cos))
        if pages.keys.data_ptr() != self._pool:
            self._graphs, self._pool = Graphs(self._embedding.device), pages.keys.data_ptr()
        buffers = self._buffers[bucket]
        reach = buffers.fill(token_ids, lens, places)
        run = partial(self._pass, buffers, reach, pages)
        if (bucket, reach) not in self._graphs:
            self._graphs.capture({(bucket, reach): run}, "drafts")
        self._graphs.launch((bucket, reach), run)
        return buffers.hidden[:count].clone()

    def _pass(self, buffers: _Buffers, reach: int, pages: ContextPages) -> None:
        x = F.embedding(buffers.token_ids, self._embedding).view_as(buffers.hidden)
        turns = self._cos[buffers.positions], self._sin[buffers.positions]
        buffers.hidden.copy_(self._layers.run(x, *turns, pages, buffers.slots, buffers.attention[reach]))


class _Buffers:
    """Those of passes of N blocks. Attributes: token_ids, positions, slots int64 [N * block]; hidden [N, block, H]."""

    def __init__(self, num_blocks: int, block: int, embedding: Tensor, num_positions: int) -> None:
        self._num_blocks, self._block = num_blocks, block
        rows, device = num_blocks * block, embedding.device
        most_pages = num_blocks * -(-num_positions // PAGE_SIZE)
        room = Room(rows, num_blocks, most_pages, num_positions)
        is_cuda = device.type == "cuda"
        self._memory = torch.zeros(3 * rows + room.size, dtype=torch.int64, device=device)
        self._host = torch.zeros(len(self._memory), dtype=torch.int64, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None
        self.token_ids, self.positions, self.slots = self._memory[: 3 * rows].view(3, rows)
        memory = PlanMemory(self._host.numpy()[3 * rows :], self._memory[3 * rows :])
        self.attention = {
            reach: plan_within(room._replace(max_len=reach), self.slots, PAGE_SIZE, memory)
            for reach in reaches(num_positions)
        }
        self.hidden = torch.zeros(num_blocks, block, embedding.shape[1], dtype=embedding.dtype, device=device)

    def fill(self, token_ids: Ints, lens: Ints, places: tuple[Ints, Ints, Ints, Ints, Ints]) -> int:
        """Takes a pass's blocks to the device in one copy. Returns the reach of the plan that they fit.

        Args:
            places: as `ContextPages.reserve_blocks` has them.
        """
        if self._copied is not None:
            self._copied.synchronize()
        at = np.zeros(self._num_blocks, dtype=np.int64)  # the block that each is
        at[: len(lens)] = np.arange(len(lens))
        slots, _, _, page_counts, pages = places
        rows = 3 * len(self.slots)
        head = self._host.numpy()[:rows].reshape(3, self._num_blocks, self._block)
        head[0], head[1] = token_ids[at], lens[at, None] + np.arange(self._block)
        head[2] = slots.reshape(-1, self._block)[at]
        counts = page_counts[at]
        tables = StepTables(
            entry_lens=np.full(self._num_blocks, self._block),
            context_lens=lens[at],
            page_counts=counts,
            pages=pages[spans((np.cumsum(page_counts) - page_counts)[at], counts)],
            parents=np.zeros(0, dtype=np.int64),
        )
        reach = next(reach for reach in self.attention if reach >= int(lens.max()) + self._block)
        end = rows + self.attention[reach].refill(tables)
        self._memory[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return reach
