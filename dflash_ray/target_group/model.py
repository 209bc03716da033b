"""One rank of the target: the sharded base model, its part of the head, and the taps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.memory import return_freed_memory
from dflash_ray.kernels import build, ops
from dflash_ray.models.context_length import context_length
from dflash_ray.models.taps import tap_layers
from dflash_ray.models.target_checkpoint import TargetCheckpoint
from dflash_ray.target_group.attention import PagedStep
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.decoder_parts import obstacle
from dflash_ray.target_group.device_decoder import DeviceDecoder, Layout
from dflash_ray.target_group.lean_decoder import LeanDecoder
from dflash_ray.target_group.linears import pack_linears
from dflash_ray.target_group.loading import load_rank
from dflash_ray.target_group.paged_cache import PagedCache
from dflash_ray.target_group.step import Ints

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepHidden:
    """What a pass leaves: [R, H] normed rows to draw from, [S, H] to score by, and the features where they are made.

    Features are [F, H] of a drafter's projector, or whatever width another projector gives.
    """

    sampled: Tensor
    features: Tensor | None
    scored: Tensor | None = None


class _TransformersDecoder:
    """The decoder as transformers has it, with its linear layers packed on a CPU."""

    def __init__(self, base: Any, device: str, tap_layer_ids: tuple[int, ...]) -> None:
        if device == "cpu":
            pack_linears(base)
        self._base = base.to(device).eval()
        self._device = device
        self._tap_layer_ids = tap_layer_ids
        self._taps = tap_layers(base, tap_layer_ids)

    def __call__(self, batch: StepBatch, step: PagedStep) -> tuple[Tensor, Tensor | None]:
        """Normed rows [T, H], and the taps [F, taps * H] of the feature rows if there are any."""
        hidden = self._base(
            input_ids=torch.from_numpy(batch.token_ids).to(self._device)[None],
            position_ids=torch.from_numpy(batch.positions).to(self._device)[None],
            use_cache=False,
            paged=step,
        ).last_hidden_state[0]
        if not self._tap_layer_ids or not len(batch.feature_rows):
            return hidden, None
        rows = torch.from_numpy(batch.feature_rows).to(self._device)
        return hidden, torch.cat([self._taps[i][0, rows] for i in self._tap_layer_ids], dim=-1)


def _decoder(
    base: Any, device: str, is_lean: bool, tp_size: int, tap_layer_ids: tuple[int, ...]
) -> LeanDecoder | DeviceDecoder | _TransformersDecoder:
    """What computes this decoder soonest; says so in the log where that is what transformers has.

    Args:
        is_lean: the layers are to be the CPU's one operator, where that is compiled.
    """
    if is_lean and not ops.is_compiled_for(base.embed_tokens.weight):
        return _TransformersDecoder(base, device, tap_layer_ids)
    if reason := obstacle(base):
        logger.info("decoder layers run as transformers has them, which is slower: %s", reason)
        return _TransformersDecoder(base, device, tap_layer_ids)
    if is_lean:
        return LeanDecoder(base, tp_size, tap_layer_ids)
    return DeviceDecoder(base, device, tap_layer_ids)


class RankModel:
    """Runs steps over the paged cache of this rank.

    Args:
        config: where its `target.kv_cache_tokens` is auto, `allocate_cache` is called before the first pass.
        projector: what makes features of the taps of `tap_layer_ids` (the drafter's fc and norm), on the rank that
            makes them; None on others.
        runs_as_device: layers are a device's operators, which a CPU has in plain torch; by default where there is one.

    Attributes:
        heads, head_dim: query heads of a layer on this rank, and their size.
        feature_width: of a context feature; 0 where none are made.
        vocab_start: first token of this rank's part of the head.
        scratch_row: row of the cache that no sequence has, for rows that only fill a pass up.
    """

    def __init__(
        self,
        checkpoint: TargetCheckpoint,
        config: DflashRayConfig,
        tp_rank: int,
        tp_size: int,
        projector: torch.nn.Module | None = None,
        tap_layer_ids: tuple[int, ...] = (),
        runs_as_device: bool | None = None,
    ) -> None:
        self._device = config.target.device
        self._runs_as_device = self._device != "cpu" if runs_as_device is None else runs_as_device
        self.dtype = dtype = getattr(torch, config.model.dtype)
        weights = load_rank(checkpoint, dtype, tp_rank, tp_size, self._device)
        base, text_config = weights.base, weights.text_config
        self.vocab_size: int = text_config.vocab_size
        self.hidden_size: int = text_config.hidden_size
        self.max_model_len = config.sequence_limit(context_length(text_config.to_dict()))
        self._head = weights.head
        self.vocab_start = self._head.vocab_start
        head_dim = getattr(text_config, "head_dim", None) or self.hidden_size // text_config.num_attention_heads
        kv_heads = [layer.self_attn.k_proj.weight.shape[0] // head_dim for layer in base.layers]
        self._new_cache = partial(PagedCache, kv_heads, head_dim, dtype=dtype, device=self._device)
        self.heads = max(layer.self_attn.q_proj.weight.shape[0] for layer in base.layers) // head_dim
        self.head_dim = head_dim
        # Of a position's keys and values on this rank.
        self.cache_row_bytes = 2 * sum(kv_heads) * head_dim * dtype.itemsize
        if config.target.kv_cache_tokens != "auto":
            self.allocate_cache(config.target.num_pages, config.target.page_size)
        if projector is not None and self._device == "cpu":
            pack_linears(projector)
        self._projector = projector
        tap_layer_ids = tap_layer_ids if projector is not None else ()
        self.feature_width = self._feature_width(len(tap_layer_ids))
        self._decoder = _decoder(base, self._device, not self._runs_as_device, tp_size, tap_layer_ids)
        del weights, base
        return_freed_memory()

    @torch.inference_mode()
    def _feature_width(self, num_taps: int) -> int:
        if self._projector is None:
            return 0
        taps = torch.zeros(1, num_taps * self.hidden_size, dtype=self.dtype, device=self._device)
        return int(self._projector(taps).shape[-1])

    def allocate_cache(self, num_pages: int, page_size: int) -> None:
        """Makes the cache, which a configuration that says how large it is has made already."""
        self.max_model_len = min(self.max_model_len, num_pages * page_size)
        pages_of_all = num_pages + 1 if self._runs_as_device else num_pages
        self._cache = self._new_cache(num_pages=pages_of_all, page_size=page_size)
        self.scratch_row = num_pages * page_size

    @property
    def cache(self) -> PagedCache:
        return self._cache

    @property
    def has_fixed_passes(self) -> bool:
        """Whether `run_rows` is there: not where a decoder, its rotary embedding or an operator looks at the batch."""
        if not isinstance(self._decoder, DeviceDecoder) or self._decoder.turns(1) is None:
            return False
        return self._device == "cpu" or build.is_loaded_for(self._device)

    def turns(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 [P, d] of all positions that a row may have."""
        assert isinstance(self._decoder, DeviceDecoder)
        turns = self._decoder.turns(self.max_model_len + 1)
        assert turns is not None
        return turns

    @torch.inference_mode()
    def run_rows(self, token_ids: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """A pass over what is on the device: normed rows [T, H], and the features [T, F] of all rows if there are any.

        Waits for nothing, and launches the same whatever the values are.
        """
        assert isinstance(self._decoder, DeviceDecoder)
        hidden, taps = self._decoder.run(token_ids, cos, sin, layout, slice(None))
        return hidden, None if self._projector is None or taps is None else self._projector(taps)

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> StepHidden:
        """Runs all rows; their keys and values are in the cache afterwards."""
        step = PagedStep(batch, self._cache, self._device)
        hidden, taps = self._decoder(batch, step)
        features = None if self._projector is None or taps is None else self._projector(taps)
        scored = self._some(hidden, batch.scored_rows) if len(batch.scored_rows) else None
        return StepHidden(self._some(hidden, batch.sample_rows), features, scored)

    def _some(self, hidden: Tensor, rows: Ints) -> Tensor:
        """Some of the rows, ascending; most passes want all of them."""
        return hidden if len(rows) == len(hidden) else hidden[torch.from_numpy(rows).to(self._device)]

    @torch.inference_mode()
    def move_rows(self, source: Ints, target: Ints) -> None:
        """Copies rows [n] of the cache to other rows; see `PagedCache.move`."""
        self._cache.move(source, target)

    @torch.inference_mode()
    def rank_logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, Vs] of this rank's tokens vocab_start, vocab_start + 1, ..."""
        return self._head(hidden)
