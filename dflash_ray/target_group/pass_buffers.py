"""The memory of a pass of a fixed number of rows: what it reads and what it leaves lie at the same place every time.

So a pass can be captured as a graph, and every product has one shape, whatever the rows are. One copy takes a pass's
inputs to the device, another one brings back what the host wants. Rows that only fill the pass up write to a row of the
cache that no sequence has, see nothing but themselves, and draw tokens that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.kernels.attention import PlanMemory, Room, StepAttention, StepTables, plan_within, reaches
from dflash_ray.kernels.columns import CommitColumn, FloatColumn, IntColumn, OutcomeColumn, PlanTensors, RowColumn
from dflash_ray.sampling.columns import PlanColumns, without_gaps
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.paged_cache import PagedCache
from dflash_ray.target_group.pass_cuts import PassRows
from dflash_ray.target_group.step import Ints

IDS_A_ROW = 16  # of penalties, bias and stop tokens that a pass has room for
MOST_DEPTH = 32  # rows on a path of drafts, the root among them
VERDICT_WIDTH = len(CommitColumn) + OutcomeColumn.TOKENS + 2 * MOST_DEPTH
# int64 values a row of the inputs; what attention reads follows.
_WIDTHS = {
    "token_ids": 1, "positions": 1, "slots": 1, "rows": len(RowColumn), "ints": len(IntColumn),
    "floats": len(FloatColumn) // 2, "ids": IDS_A_ROW, "values": IDS_A_ROW // 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PassLayout:
    """One kind of pass over the buffers: a `device_decoder.Layout`."""

    cache: PagedCache
    slots: Tensor
    attention: StepAttention


def room_of(num_rows: int, max_model_len: int, page_size: int) -> Room:
    """What attention plans for in a pass of so many rows."""
    return Room(num_rows, num_rows, num_rows * -(-max_model_len // page_size), max_model_len, MOST_DEPTH)


class PassBuffers:
    """Those of passes of N rows.

    Attributes:
        spans: most rows of a sequence that kinds of passes have, ascending.
        token_ids, positions: int64 [N] on the device.
        hidden: [N, H], normed rows.
        features: [N, feature_width], or None.
        plan: N sequences of N rows, most of which mean nothing in most passes.
    """

    def __init__(
        self,
        num_rows: int,
        model: RankModel,
        device: torch.device,
    ) -> None:
        self.num_rows, self._dtype = num_rows, model.dtype
        self._cache, self._scratch_row = model.cache, model.scratch_row
        self._is_cuda = device.type == "cuda"
        self._num_fixed = num_rows * sum(_WIDTHS.values())
        self.spans = reaches(model.max_model_len)
        room = room_of(num_rows, model.max_model_len, model.cache.page_size)
        size = self._num_fixed + room.size
        self._inputs = torch.zeros(size, dtype=torch.int64, device=device)
        staging = torch.zeros(size, dtype=torch.int64, pin_memory=self._is_cuda)
        self._staging, self._host = staging, dict(self._sections(staging.numpy()))
        self._staged = torch.cuda.Event() if self._is_cuda else None
        parts = dict(self._sections(self._inputs))
        self.token_ids, self.positions, self.slots = (
            parts[name].view(-1) for name in ("token_ids", "positions", "slots")
        )
        memory = PlanMemory(staging.numpy()[self._num_fixed :], self._inputs[self._num_fixed :])
        self._attention = {
            (span, depth > 0): plan_within(
                room._replace(max_len=span, depth=depth), self.slots, self._cache.page_size, memory
            )
            for span in self.spans
            for depth in (0, MOST_DEPTH)
        }
        self.plan = PlanTensors(
            parts["rows"], parts["ints"], parts["floats"], parts["ids"].view(-1), parts["values"].view(-1)
        )
        self.hidden = torch.zeros(num_rows, model.hidden_size, dtype=self._dtype, device=device)
        # What the host wants of a pass: lines of the verdict and, behind them, features.
        self._verdict_bytes = num_rows * VERDICT_WIDTH * 8
        self._feature_bytes = model.feature_width * self._dtype.itemsize
        self._outputs = torch.zeros(
            self._verdict_bytes + num_rows * self._feature_bytes, dtype=torch.uint8, device=device
        )
        self.verdict = self._outputs[: self._verdict_bytes].view(torch.int64).view(num_rows, VERDICT_WIDTH)
        self.features = self._features_in(self._outputs, num_rows) if self._feature_bytes else None
        none = np.zeros(0, dtype=np.int64)
        self.fill(PassRows(none, none, none, StepTables(none, none, none, none, none)))
        self.send()

    @staticmethod
    def num_bytes(num_rows: int, model: RankModel, page_size: int) -> int:
        """What buffers of so many rows take on the device."""
        inputs = num_rows * sum(_WIDTHS.values()) + room_of(num_rows, model.max_model_len, page_size).size
        values = num_rows * (model.hidden_size + model.feature_width)
        return 8 * (inputs + num_rows * VERDICT_WIDTH) + values * model.dtype.itemsize

    def _sections(self, flat: Any) -> Iterator[tuple[str, Any]]:
        """Views [N, width] of inputs, on the host or on the device."""
        at = 0
        for name, width in _WIDTHS.items():
            part = flat[at : at + self.num_rows * width].reshape(self.num_rows, width)
            is_float = name in ("floats", "values")
            yield name, part.view(torch.float32 if torch.is_tensor(part) else np.float32) if is_float else part
            at += self.num_rows * width

    def _features_in(self, block: Tensor, num_rows: int) -> Tensor:
        end = self._verdict_bytes + num_rows * self._feature_bytes
        return block[self._verdict_bytes : end].view(self._dtype).view(num_rows, -1)

    def layout(self, span: int, is_tree: bool) -> PassLayout:
        """The kind of pass whose sequences have at most so many rows."""
        return PassLayout(self._cache, self.slots, self._attention[span, is_tree])

    def fill(self, rows: PassRows) -> tuple[int, bool]:
        """Writes a pass's rows to where `send` copies them from; nothing draws until `fill_plan`. Returns its kind."""
        if self._staged is not None:
            self._staged.synchronize()  # with the copy of the pass before
        count, host = len(rows.token_ids), self._host
        for name, column, filler in (
            ("token_ids", rows.token_ids, 0), ("positions", rows.positions, 0), ("slots", rows.slots, self._scratch_row)
        ):  # fmt: skip
            host[name][:count, 0], host[name][count:] = column, filler
        longest = int((rows.tables.context_lens + rows.tables.entry_lens).max(initial=1))
        kind = (next(span for span in self.spans if span >= longest), len(rows.tables.parents) > 0)
        self._end = self._num_fixed + self._attention[kind].refill(rows.tables)
        _clear_plan(host)
        return kind

    def fill_plan(self, columns: PlanColumns, sequences: slice, at: Ints) -> None:
        """Writes the plan of some of a step's sequences; their rows of the plan are rows `at` of the pass."""
        plan, host = columns.tensors, self._host
        firsts = columns.first_rows[sequences]
        first = int(firsts[0])
        own = slice(first, first + len(at))
        rows, ints = plan.rows[own].numpy().copy(), plan.ints[sequences].numpy().copy()
        rows[:, RowColumn.SEQUENCE] -= sequences.start
        parents = rows[:, RowColumn.PARENT]
        rows[:, RowColumn.PARENT] = np.where(parents < 0, -1, at[np.maximum(parents - first, 0)])
        roots = at[firsts - first]
        ints[:, IntColumn.FIRST_ROW] = roots
        # Features are made of all rows.
        ints[:, IntColumn.FEATURE_ROW] = np.where(ints[:, IntColumn.FEATURE_ROW] < 0, -1, roots)
        ids, values = without_gaps(ints, plan.ids.numpy(), plan.values.numpy())
        host["rows"][at], host["ints"][: len(ints)] = rows, ints
        host["floats"][: len(ints)] = plan.floats[sequences].numpy()
        host["ids"].reshape(-1)[: len(ids)], host["values"].reshape(-1)[: len(values)] = ids, values

    def send(self) -> None:
        """Takes what was written to the device, in one copy."""
        self._inputs[: self._end].copy_(self._staging[: self._end], non_blocking=True)
        if self._staged is not None:
            self._staged.record()

    def fetch(self, num_sequences: int, num_features: int) -> tuple[Tensor, Tensor | None]:
        """Begins to bring back the verdict's first lines and, if any are wanted, the first rows of features.

        One copy to memory of its own on the host, which is whole when the device has come so far.
        """
        end = num_sequences * VERDICT_WIDTH * 8
        if num_features:
            end = self._verdict_bytes + num_features * self._feature_bytes
        block = torch.empty(end, dtype=torch.uint8, pin_memory=self._is_cuda)
        block.copy_(self._outputs[:end], non_blocking=True)
        verdict = block[: num_sequences * VERDICT_WIDTH * 8].view(torch.int64).view(-1, VERDICT_WIDTH)
        return verdict, self._features_in(block, num_features) if num_features else None


def _clear_plan(host: dict[str, NDArray[Any]]) -> None:
    """Sequences of one row, which is argmax, and rows of the last of them, which has none of its own unless all are."""
    rows, ints = host["rows"], host["ints"]
    rows[:] = 0
    rows[:, RowColumn.SEQUENCE], rows[:, RowColumn.PARENT] = len(rows) - 1, -1
    ints[:] = 0
    ints[:, IntColumn.NUM_ROWS], ints[:, IntColumn.FEATURE_ROW] = 1, -1
    host["floats"][:] = 0
