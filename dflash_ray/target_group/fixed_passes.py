"""Steps as passes of fixed numbers of rows, on devices whose decoder runs over buffers.

A pass is two launches: the layers, and head with verdict where rows draw. Both are graphs on a GPU and calls over the
same buffers elsewhere. What needs more of the verdict (drafts that were drawn, log-probabilities, more penalised tokens
than there is room for) verifies outside of a graph, by logits of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dflash_ray.config import DflashRayConfig
from dflash_ray.kernels.columns import CommitColumn, PlanTensors
from dflash_ray.sampling.columns import PlanColumns, without_gaps
from dflash_ray.sampling.ranks import RankGroup
from dflash_ray.sampling.table import RANGES, Need
from dflash_ray.sampling.verify import Verdict, launch, to_verdict, verify
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.graphs import Graphs
from dflash_ray.target_group.model import RankModel, StepHidden
from dflash_ray.target_group.pass_buffers import IDS_A_ROW, MOST_DEPTH, PassBuffers
from dflash_ray.target_group.pass_cuts import PassRows, StepRows, within
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.step import Ints

# What a verdict may need, each kind with all that those before it have.
_NEEDS = {
    "greedy": 0,
    "drawn": int(Need.DRAW),
    "limited": Need.DRAW | Need.MIN_P | Need.TOP_K | Need.TOP_P | Need.ADJUSTMENT,
}


@dataclass(frozen=True, slots=True)
class _PassLeft:
    """What one pass of a step leaves.

    Attributes:
        lines: of the verdict, on their way to the host; None where the pass decides nothing.
        logits: of the rows that draw, where they are verified outside of the passes.
        features, scored: of the rows that want them.
    """

    lines: Tensor | None
    logits: Tensor | None
    features: Tensor | None
    scored: Tensor | None


@dataclass(frozen=True, slots=True)
class _StepLeft(StepHidden):
    """What the passes of a step leave.

    Attributes:
        lines, logits: as of a pass.
        arrived: when lines and features are on the host; None where they are.
    """

    lines: Tensor | None = None
    logits: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class FixedPasses(GroupRunner):
    """A runner whose passes have one of few numbers of rows. Takes columns on the host.

    Args:
        shapes: numbers of rows, ascending; a step is a pass of the smallest that holds it.
        is_exact: a step with more rows is several passes, of one shape; otherwise it runs as it is.
        returns_features: features come to the host with the verdict; else they stay on the device.
    """

    def __init__(
        self,
        model: RankModel,
        ranks: RankGroup,
        device: str,
        shapes: Sequence[int],
        is_exact: bool,
        returns_features: bool = False,
    ) -> None:
        super().__init__(model, ranks, "cpu")
        self._device = torch.device(device)
        self._is_exact, self._returns_features = is_exact, returns_features
        self._cos, self._sin = model.turns()
        self._buffers = [PassBuffers(rows, model, self._device) for rows in shapes]
        self._graphs = Graphs(self._device)

    def capture(self, has_trees: bool) -> None:
        """Captures all passes there are, on a GPU. Collective."""
        functions: dict[Hashable, Callable[[], None]] = {}
        for buffers in self._buffers:
            for span in buffers.spans:
                for is_tree in (False, True) if has_trees else (False,):
                    functions[buffers.num_rows, span, is_tree] = partial(self._layers, buffers, span, is_tree)
            for kind in _NEEDS:
                functions[buffers.num_rows, kind] = partial(self._verdict, buffers, kind)
        self._graphs.capture(functions, "passes")

    @torch.inference_mode()
    def forward(self, batch: StepBatch, columns: PlanColumns | None = None) -> StepHidden:
        rows = StepRows(batch)
        buffers = next((one for one in self._buffers if one.num_rows >= len(batch.token_ids)), self._buffers[-1])
        cuts = rows.cuts(buffers.num_rows) if rows.fits(buffers.num_rows, MOST_DEPTH) else []
        if not cuts or (len(cuts) > 1 and not self._is_exact):
            return super().forward(batch, columns)
        kind = "" if columns is None else _kind(columns, buffers)
        left = [self._run(buffers, rows.part(cut), cut, batch, columns, kind) for cut in cuts]
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
            if columns is None or len(left) > 1:
                arrived.synchronize()
        return _StepLeft(
            sampled=buffers.hidden[:0],
            features=_joined([one.features for one in left]),
            scored=_joined([one.scored for one in left]),
            lines=_joined([one.lines for one in left]),
            logits=_joined([one.logits for one in left]),
            arrived=arrived,
        )

    def verify(self, hidden: StepHidden, columns: PlanColumns) -> Verdict:
        if not isinstance(hidden, _StepLeft):
            return super().verify(hidden, _on_device(columns, self._device))
        if hidden.lines is None:
            assert hidden.logits is not None
            columns = _on_device(columns, self._device)
            return verify(hidden.logits, self._model.vocab_start, columns, self._ranks, hidden.features)
        if hidden.arrived is not None:
            hidden.arrived.synchronize()
        commits, outcome = np.split(hidden.lines.numpy(), [len(CommitColumn)], axis=1)
        return to_verdict(outcome, commits, MOST_DEPTH)

    def _run(
        self, buffers: PassBuffers, part: PassRows, cut: slice, batch: StepBatch, columns: PlanColumns | None, kind: str
    ) -> _PassLeft:
        """Launches one pass. `kind` of its verdict, "" where none is made in the pass."""
        drawing, wanted, scored = (
            rows[within(rows, cut)] - cut.start for rows in (batch.sample_rows, batch.feature_rows, batch.scored_rows)
        )
        span, is_tree = buffers.fill(part)
        num_sequences = 0
        if kind and len(drawing) and columns is not None:
            sequences = within(batch.sample_rows[columns.first_rows], cut)
            num_sequences = sequences.stop - sequences.start
            buffers.fill_plan(columns, sequences, drawing)
        buffers.send()
        self._graphs.launch((buffers.num_rows, span, is_tree), partial(self._layers, buffers, span, is_tree))
        logits = None
        if num_sequences:
            self._graphs.launch((buffers.num_rows, kind), partial(self._verdict, buffers, kind))
        elif len(drawing):
            logits = _some(self._model.rank_logits(buffers.hidden), drawing)
        # What is verified outside of the pass moves features where they were made.
        leaves = self._returns_features and logits is None and _is_run(wanted)
        has_features = buffers.features is not None and len(wanted) > 0
        num_fetched = int(wanted[-1]) + 1 if has_features and leaves else 0
        lines = features = None
        if num_sequences or num_fetched:
            lines, features = buffers.fetch(num_sequences, num_fetched)
        if features is not None:
            features = features[int(wanted[0]) :]
        elif has_features and buffers.features is not None:
            features = _some(buffers.features, wanted)
            features = features.cpu() if self._returns_features and logits is None else features
        return _PassLeft(
            lines=lines if num_sequences else None,
            logits=logits,
            features=features,
            scored=_some(buffers.hidden, scored) if len(scored) else None,
        )

    def _layers(self, buffers: PassBuffers, span: int, is_tree: bool) -> None:
        cos, sin = self._cos[buffers.positions], self._sin[buffers.positions]
        hidden, features = self._model.run_rows(buffers.token_ids, cos, sin, buffers.layout(span, is_tree))
        buffers.hidden.copy_(hidden)
        if features is not None and buffers.features is not None:
            buffers.features.copy_(features)

    def _verdict(self, buffers: PassBuffers, kind: str) -> None:
        logits, none = self._model.rank_logits(buffers.hidden), np.zeros(0, dtype=np.int64)
        no_drafts = logits.new_empty(0, 0, dtype=torch.int64), logits.new_empty(0, 0, dtype=torch.float32)
        columns = PlanColumns(buffers.plan, *no_drafts, MOST_DEPTH, _NEEDS[kind], none, none)
        outcome, commits = launch(logits, self._model.vocab_start, columns, self._ranks, buffers.features)
        buffers.verdict[:, : len(CommitColumn)].copy_(commits)
        buffers.verdict[:, len(CommitColumn) :].copy_(outcome)


def _kind(columns: PlanColumns, buffers: PassBuffers) -> str:
    """Of a step's verdicts, "" where passes do not make them."""
    num_ids = int(columns.tensors.ints[:, [at + 1 for at in RANGES]].sum())
    needs = columns.needs & ~Need.COUNTS
    is_other = needs & (Need.REJECTION | Need.LOGPROBS)
    if is_other or columns.depth > MOST_DEPTH or num_ids > IDS_A_ROW * buffers.num_rows:
        return ""
    return next(kind for kind, has in _NEEDS.items() if not needs & ~has)


def _on_device(columns: PlanColumns, device: torch.device) -> PlanColumns:
    """Columns of the host's table on a device, without what they don't name."""
    if device.type == "cpu":
        return columns
    plan = columns.tensors
    ints = plan.ints.numpy().copy()
    ids, values = map(torch.from_numpy, without_gaps(ints, plan.ids.numpy(), plan.values.numpy()))
    tensors = (plan.rows, torch.from_numpy(ints), plan.floats, ids, values)
    moved = [one.to(device, non_blocking=True) for one in (*tensors, columns.draft_ids, columns.draft_probs)]
    return replace(columns, tensors=PlanTensors(*moved[:5]), draft_ids=moved[5], draft_probs=moved[6])


def _is_run(rows: Ints) -> bool:
    return len(rows) > 0 and int(rows[-1] - rows[0]) + 1 == len(rows)


def _some(values: Tensor, rows: Ints) -> Tensor:
    """A copy of some rows, ascending."""
    if _is_run(rows):
        return values[int(rows[0]) : int(rows[-1]) + 1].clone()
    return values[torch.from_numpy(rows).to(values.device)]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return None if not found else found[0] if len(found) == 1 else torch.cat(found)


def new_runner(
    model: RankModel, ranks: RankGroup, config: DflashRayConfig, returns_features: bool = False
) -> GroupRunner:
    """What runs a rank's passes as its device does it best; captures what there is to capture. Collective."""
    target = config.target
    if not model.has_fixed_passes:
        return GroupRunner(model, ranks, target.device)
    runner = FixedPasses(model, ranks, target.device, target.pass_rows, target.exact, returns_features)
    runner.capture(has_trees=config.router.tree_width > 1)
    return runner
