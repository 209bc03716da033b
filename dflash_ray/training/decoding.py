"""Many sequences through the target's own engine in this process: chunked prefill and drafts verified in one pass.

A job knows its sequences and their limits beforehand, so pages are promised for a whole sequence when it is admitted
and nothing is ever preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.core.draft_blocks import DraftBlock
from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.kernels.columns import Finish
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.sampling.parameters import SamplingParams
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.colocated import ColocatedDrafter
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.step import (
    Drafts,
    EntryStatus,
    Opening,
    StepFeatures,
    StepInput,
    StepOutput,
)
from dflash_ray.target_group.step_check import StepLimits, check_step
from dflash_ray.target_group.tensor_parallel import create_store, init_process_group
from dflash_ray.training.config import EngineSection
from dflash_ray.training.trees import Candidates

_INIT_TIMEOUT_S = 60.0
_SEED_BITS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One sequence to continue.

    Attributes:
        draft_tokens: drafts asked of the engine's drafter for each pass; 0 decodes plainly.
        wants_taps: whether the features of all rows are wanted back.
        num_candidates: of each slot that are wanted back; 0 for no blocks. The same for all requests of a run.
        tree_width: above 1 the drafts are trees of `draft_tokens` nodes, in which so many follow the same one at most.
            The same for all requests of a run.
    """

    token_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    draft_tokens: int = 0
    wants_taps: bool = False
    num_candidates: int = 0
    tree_width: int = 1


@dataclass(slots=True)
class Decoded:
    """A finished sequence.

    Attributes:
        token_ids: the new tokens, a stop token included.
        taps: bfloat16 [T - 1, width] of the first T - 1 of all T tokens (the last one was never run), or None.
        stats: of the passes after the prefill.
        is_stopped: whether it ended by a stop token.
        blocks: the drafted blocks that were verified, when candidates were wanted.
        error: why the target gave the sequence up, or empty; the rest then counts for nothing.
    """

    token_ids: list[int]
    taps: Tensor | None
    stats: AcceptanceStats
    is_stopped: bool
    blocks: list[Candidates] = field(default_factory=list)
    error: str = ""


@dataclass(slots=True)
class _Running:
    request: DecodeRequest
    tokens: list[int]
    num_pages: int
    stats: AcceptanceStats
    num_prefilled: int = 0
    drafts: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    taps: list[Tensor] = field(default_factory=list)
    blocks: list[Candidates] = field(default_factory=list)

    @property
    def is_decoding(self) -> bool:
        return len(self.tokens) > len(self.request.token_ids)

    @property
    def num_left(self) -> int:
        return len(self.request.token_ids) + self.request.max_new_tokens - len(self.tokens)


class BatchDecoder:
    """Runs requests to their ends over one engine.

    Args:
        settings: page size and limits that the engine was built with.
        limits: of the engine.
        stop_ids: tokens that end a sequence.
    """

    def __init__(self, engine: Engine, settings: EngineSection, limits: StepLimits, stop_ids: Sequence[int]) -> None:
        self._engine = engine
        self._settings = settings
        self._limits = limits
        self._stop_ids = tuple(stop_ids)

    def run(self, requests: Iterable[DecodeRequest], stop_ids: Sequence[int] = ()) -> Iterator[tuple[int, Decoded]]:
        """Yields each request's index and result as they finish; `stop_ids` are stop tokens besides the decoder's.

        Raises ValueError when a request needs more than all pages. One that the target gives up, as it is longer than
        the context or its logits are not finite, comes back with an error.
        """
        waiting = deque(enumerate(requests))
        running: dict[int, _Running] = {}
        stops = [*self._stop_ids, *stop_ids]
        close: list[int] = []
        while waiting or running:
            opened = self._admit(waiting, running, stops)
            output = self._engine.step(self._step(close, opened, running))
            close = []
            for index, decoded in self._take(output, running):
                close.append(index)
                yield index, decoded
        self._engine.close(close)

    def _pages(self, request: DecodeRequest) -> int:
        """Pages of the longest that a sequence can become, with a block of drafts behind it."""
        length = len(request.token_ids) + request.max_new_tokens + request.draft_tokens
        return -(-length // self._settings.page_size)

    def _admit(
        self, waiting: deque[tuple[int, DecodeRequest]], running: dict[int, _Running], stops: list[int]
    ) -> list[Opening]:
        opened: list[Opening] = []
        free = self._settings.kv_cache_tokens // self._settings.page_size - sum(r.num_pages for r in running.values())
        rows = sum(1 + one.request.draft_tokens for one in running.values())  # when all verify a whole block
        while waiting:
            index, request = waiting[0]
            rows += 1 + request.draft_tokens
            if running and rows > self._settings.max_batch_tokens:
                break
            needed = self._pages(request)
            if needed > free:
                if not running:
                    raise ValueError(f"engine.kv_cache_tokens: a sequence needs {needed} pages and {free} exist")
                break
            waiting.popleft()
            free -= needed
            running[index] = _Running(request, list(request.token_ids), needed, AcceptanceStats(request.draft_tokens))
            opened.append(_opening(index, request, stops))
        return opened

    def _step(self, close: list[int], opened: list[Opening], running: dict[int, _Running]) -> StepInput:
        """Verify chains of all that decode, then chunks of prompts in what is left of the pass."""
        chains = {index: one for index, one in running.items() if one.is_decoding}
        drafts = [one.drafts[: max(0, one.num_left - 1)] for one in chains.values()]
        parents = _ints(parent for one in chains.values() for parent in one.parents[: max(0, one.num_left - 1)])
        counts = _ints(map(len, drafts))
        room = self._settings.max_batch_tokens - len(chains) - int(counts.sum())
        chunks: dict[int, int] = {}
        for index, one in running.items():
            chunk = min(len(one.request.token_ids) - one.num_prefilled, room)
            if chunk > 0:
                chunks[index] = chunk
                one.num_prefilled += chunk
                room -= chunk
        drafting = {index: one.request.draft_tokens for index, one in running.items() if one.request.draft_tokens}
        step = StepInput(
            close=_ids(close),
            open=opened,
            prefill_ids=_ids(chunks),
            prefill_lens=_ints(chunks.values()),
            verify_ids=_ids(chains),
            base_lens=_ints(len(one.tokens) for one in chains.values()),
            drafts=Drafts(counts, _ints(token for chain in drafts for token in chain), parents),
            draft_ids=_ids(drafting),
            draft_counts=_ints(drafting.values()),
            num_candidates=max(1, *(one.request.num_candidates for one in running.values())),
            tree_width=max(1, *(one.request.tree_width for one in running.values())),
        )
        check_step(step, self._limits)
        return step

    def _take(self, output: StepOutput, running: dict[int, _Running]) -> Iterator[tuple[int, Decoded]]:
        """Books a step's tokens, features and drafts; yields what has finished."""
        if output.features is not None:
            _take_taps(output.features, running)
        offset = 0
        finished: dict[int, int] = {}
        errors = iter(output.errors)
        failed: dict[int, str] = {}
        columns = (output.sequence_ids, output.statuses, output.num_tokens, output.num_accepted, output.finishes)
        for index, status, count, num_accepted, finish in zip(*(c.tolist() for c in columns), strict=True):
            if status == EntryStatus.FAILED:
                failed[index] = next(errors)
                continue
            assert status == EntryStatus.OK, "pages are promised, and sequences open until here"
            one = running[index]
            if one.is_decoding:
                one.stats.record(min(len(one.drafts), max(0, one.num_left - 1)), num_accepted)
            one.drafts, one.parents = [], []
            one.tokens += output.token_ids[offset : offset + count].tolist()
            offset += count
            if finish:
                finished[index] = finish
        for block in output.colocated_drafts:
            one = running[block.sequence_id]
            if not one.is_decoding:  # the prompt lacks its last token alone, which needs no verification
                continue
            one.drafts = block.draft_ids
            one.parents = list(range(len(one.drafts))) if block.parents is None else block.parents.tolist()
            if one.request.num_candidates and block.sequence_id not in finished:
                one.blocks.append(_candidates(block))
        for index, error in failed.items():
            one = running.pop(index)
            yield index, Decoded([], None, one.stats, False, error=error)
        for index, reason in finished.items():
            one = running.pop(index)
            yield (
                index,
                Decoded(
                    one.tokens[len(one.request.token_ids) :],
                    torch.cat(one.taps) if one.request.wants_taps else None,
                    one.stats,
                    reason == Finish.STOP,
                    one.blocks,
                ),
            )


def _ids(values: Iterable[int]) -> NDArray[np.uint64]:
    return np.fromiter(values, dtype=np.uint64)


def _ints(values: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(values, dtype=np.int64)


def _take_taps(features: StepFeatures, running: dict[int, _Running]) -> None:
    columns = (features.sequence_ids, features.num_rows, features.first_rows)
    for index, count, first in zip(*(column.tolist() for column in columns), strict=True):
        running[index].taps.append(features.rows[first : first + count].to(torch.bfloat16, copy=True))


def _candidates(block: DraftBlock) -> Candidates:
    return Candidates(block.committed_len, block.candidate_ids.astype(np.int64), block.log_probs)


def _opening(index: int, request: DecodeRequest, stop_ids: list[int]) -> Opening:
    return Opening(
        sequence_id=index,
        token_ids=_ints(request.token_ids),
        prompt_len=len(request.token_ids),
        max_new_tokens=request.max_new_tokens,
        stop_ids=_ints(stop_ids),
        sampling=SamplingParams(temperature=request.temperature, top_p=request.top_p, seed=request.seed & _SEED_BITS),
        wants_features=request.wants_taps or request.draft_tokens > 0,
    )


@contextmanager
def local_decoder(
    target_path: str,
    settings: EngineSection,
    stop_ids: Sequence[int] = (),
    tap_layer_ids: tuple[int, ...] = (),
    drafter: DrafterCheckpoint | None = None,
) -> Iterator[BatchDecoder]:
    """A decoder over `local_engine`."""
    with local_engine(target_path, settings, tap_layer_ids, drafter) as (engine, limits):
        yield BatchDecoder(engine, settings, limits, stop_ids)


@contextmanager
def local_engine(
    target_path: str,
    settings: EngineSection,
    tap_layer_ids: tuple[int, ...] = (),
    drafter: DrafterCheckpoint | None = None,
) -> Iterator[tuple[Engine, StepLimits]]:
    """The target on one rank in this process.

    Args:
        tap_layer_ids: layers whose raw outputs come back as taps; with `drafter` its own layers are tapped instead.
        drafter: drafts in the same process, as the colocated drafter of a target group does.
    """
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    target = resolve_target(target_path)
    is_ours = not torch.distributed.is_initialized()
    if is_ours:
        init_process_group(create_store("127.0.0.1", 1, _INIT_TIMEOUT_S), 0, 1, settings.device, True, 0)
    try:
        yield _build_engine(target, target_path, settings, tap_layer_ids, drafter)
    finally:
        if is_ours:
            torch.distributed.destroy_process_group()


def _build_engine(
    target: TargetCheckpoint,
    target_path: str,
    settings: EngineSection,
    tap_layer_ids: tuple[int, ...],
    drafter: DrafterCheckpoint | None,
) -> tuple[Engine, StepLimits]:
    config = settings.serving_config(target_path)
    dtype = getattr(torch, settings.dtype)
    projector: torch.nn.Module = torch.nn.Identity()
    if drafter is not None:
        projector = drafter.build_projector(dtype).to(settings.device)
        tap_layer_ids = drafter.config.target_layer_ids
    model = RankModel(target, config, 0, 1, projector, tap_layer_ids)
    colocated = None
    if drafter is not None:
        block_drafter = BlockDrafter(drafter, target, settings.device, dtype)
        colocated = ColocatedDrafter(block_drafter, config.target.kv_cache_rows, raises=True)
    engine = Engine(
        GroupRunner(model, SingleRank(), settings.device),
        config.target.num_pages,
        config.target.page_size,
        model.max_model_len,
        colocated,
    )
    return engine, StepLimits(settings.max_batch_tokens, model.max_model_len, model.vocab_size)
