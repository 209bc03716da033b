"""Fits a drafter: warm-up and cosine, clipping, averaged weights; goes on where it was cut off.

The order of the data follows from seed and step, so only weights, optimiser and step are checkpointed. The weights are
finite after every step: one whose loss or gradient is not is left out, by all workers together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dflash_ray.training.batches import BatchSource, BlockBatch
from dflash_ray.training.checkpoints import About, Recipe, RunError, load_checkpoint, save_checkpoint
from dflash_ray.training.config import FitSection
from dflash_ray.training.objective import BlockLoss, DrafterObjective
from dflash_ray.training.optimizers import STATE_KEYS, build_optimizers
from dflash_ray.training.recipe import changes_between

_SEED_STRIDE = 1_000_003  # between the seeds of runs; steps lie in between


class Trainer:
    """Owns the weights, the optimiser and the step of one run, on one worker of `world_size`.

    Args:
        wrapped: the objective, possibly wrapped to average gradients over the workers.
        seed: of the order of the data.
        recipe: what the weights follow from; a checkpoint of another is refused.

    Attributes:
        step: steps behind, those that were left out too.
        num_skipped: steps that were left out.
        changes: settings that were changed under way.
    """

    def __init__(
        self,
        objective: DrafterObjective,
        wrapped: nn.Module,
        section: FitSection,
        seed: int,
        recipe: Recipe,
        state_file: Path,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._section = section
        self._objective, self._wrapped = objective, wrapped
        self._seed = seed * _SEED_STRIDE
        self._recipe = recipe
        self._state_file = state_file
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(section.device)
        self.parameters = objective.trainable()
        self.averaged = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._optimizers = build_optimizers(section, self.parameters)
        names = {parameter: name for name, parameter in self.parameters.items()}
        self._optimizer_of = {
            names[parameter]: optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.step = 0
        self.num_skipped = 0
        self.changes: list[dict[str, Any]] = []
        self._skipped_in_a_row = 0

    def run(self, source: BatchSource, report: Callable[[int, BlockLoss | None], None]) -> None:
        """Trains until max_steps; rank 0 saves every `checkpoint_every_s` and at the end.

        Args:
            report: called after every step, with None for one that was left out.

        Raises RunError when too many steps in a row are left out; the state before them is kept.
        """
        saved_at = time.monotonic()
        while self.step < self._section.max_steps:
            size = self._section.conversations_per_step
            batch = source.draw(size, self._seed + self.step, self._rank, self._world_size)
            result = self._train_step(batch)
            self.step += 1
            report(self.step, result)
            if self._skipped_in_a_row == 0 and time.monotonic() - saved_at > self._section.checkpoint_every_s:
                self.save()
                saved_at = time.monotonic()
        self.save()

    def _train_step(self, batch: BlockBatch) -> BlockLoss | None:
        result = self._forward(self._wrapped, batch)
        self._wrapped.zero_grad(set_to_none=True)
        result.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self._section.clip_norm)
        if not self._is_everywhere(torch.isfinite(result.loss) & torch.isfinite(norm)):
            self._skip(batch, f"loss {result.loss.item():g}, gradient norm {norm.item():g}")
            return None
        self._skipped_in_a_row = 0
        rate = learning_rate(self._section, self.step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        if not torch.isfinite(nn.utils.get_total_norm(self.parameters.values())):
            raise RunError(
                f"fit: the weights are too large to compute with after step {self.step + 1}, at a learning rate of"
                f" {rate:g}. {self._advice()}. The last checkpoint is kept"
            )
        decay = min(self._section.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.averaged[name].lerp_(parameter, 1 - decay)
        return result

    def _is_everywhere(self, flag: Tensor) -> bool:
        """Whether it is true on all workers, so that they decide alike."""
        if self._world_size > 1:
            flag = flag.int()
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def _skip(self, batch: BlockBatch, seen: str) -> None:
        """Counts a step that is left out. Raises RunError after too many in a row, with the state before them saved."""
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row < self._section.max_skipped_steps:
            return
        has_finite_taps = self._is_everywhere(torch.isfinite(batch.taps).all().to(self._device))
        last = self.step + 1
        self.step = last - self._skipped_in_a_row
        self.num_skipped -= self._skipped_in_a_row  # they come again
        if self.step:
            self.save()
        advice = self._advice()
        if not has_finite_taps:
            advice = "The target overflows in engine.dtype: give another, and another work_dir for its shards"
        raise RunError(
            f"fit: steps {self.step + 1} to {last} were left out, as their loss or gradient is not finite (at last"
            f" {seen}). {advice}. The state after step {self.step} is kept"
        )

    def _advice(self) -> str:
        section = self._section
        bf16 = " or set fit.bf16=false" if section.bf16 and section.device == "cuda" else ""
        named = ", name the key in fit.changed_keys" if self._state_file.exists() else ""
        return (
            f"Lower fit.learning_rate ({section.learning_rate:g}) or fit.clip_norm ({section.clip_norm:g}){bf16}"
            f"{named} and run `fit` again"
        )

    @torch.no_grad()
    def measure(self, batch: BlockBatch) -> BlockLoss:
        """Loss of a batch that is not trained on, with the weights of this moment; other workers take no part."""
        return self._forward(self._objective, batch)

    def _forward(self, module: nn.Module, batch: BlockBatch) -> BlockLoss:
        # Most CPUs have no bfloat16 products, and emulate them at a tenth of the speed.
        is_bf16 = self._section.bf16 and self._device.type == "cuda"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_bf16):
            result: BlockLoss = module(batch.to(self._device))
        return result

    def save(self) -> None:
        """Rank 0 writes the state whole: a kill at any moment leaves the last checkpoint. Raises DiskFullError."""
        if self._rank != 0:
            return
        state: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            state[f"model.{name}"] = parameter.detach()
            state[f"averaged.{name}"] = self.averaged[name]
            optimizer = self._optimizer_of[name]
            for key, value in optimizer.state[parameter].items():
                state[_state_name(optimizer, key, name)] = value
        save_checkpoint(self._state_file, state, About(self._recipe, self.num_skipped, self.changes))

    def resume(self) -> None:
        """Goes on from the last checkpoint, if there is one. Raises RunError when it is of another run."""
        if not self._state_file.exists():
            return
        state, about = load_checkpoint(self._state_file)
        changes = changes_between(about.recipe, self._recipe, self._section.changed_keys, str(self._state_file))
        for name, parameter in self.parameters.items():
            stored = state.get(f"model.{name}")
            if stored is None or stored.shape != parameter.shape:
                raise RunError(f"{self._state_file}: is of a drafter of another shape; use another work_dir")
            with torch.no_grad():
                parameter.copy_(stored)
                self.averaged[name].copy_(state[f"averaged.{name}"])
            optimizer = self._optimizer_of[name]
            for key in STATE_KEYS:
                value = state.get(_state_name(optimizer, key, name))
                if value is not None:
                    optimizer.state[parameter][key] = value.to("cpu" if key == "step" else self._device)
        self.step, self.num_skipped = int(state["step"]), about.num_skipped
        self.changes = [*about.changes, *({"step": self.step} | change for change in changes)]


def _state_name(optimizer: torch.optim.Optimizer, key: str, parameter: str) -> str:
    """Under which a checkpoint holds it; another optimiser doesn't find it."""
    return f"{type(optimizer).__name__.lower()}.{key}.{parameter}"


def learning_rate(section: FitSection, step: int) -> float:
    """Linear warm-up, then a cosine to the final fraction."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, section.max_steps - section.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    final = section.final_learning_rate_fraction
    return section.learning_rate * (final + (1 - final) * cosine)
