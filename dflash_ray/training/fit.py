"""`fit`: trains a drafter on the shards, in this process or on the workers of Ray Train."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dflash_ray.core.files import sha256_of, write_text
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint, load_drafter, save_drafter
from dflash_ray.models.drafter_config import parse_dflash_config
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.training.batches import BatchSource, draft_vocabulary
from dflash_ray.training.checkpoints import RunError, check_finite
from dflash_ray.training.config import TrainingConfig
from dflash_ray.training.curves import Curves
from dflash_ray.training.drafter_setup import (
    drafter_config_values,
    initialise_from_drafter,
    initialise_new,
)
from dflash_ray.training.evaluate import ALL, choose_answers, follow_whole_blocks
from dflash_ray.training.losses import IGNORE
from dflash_ray.training.objective import BlockLoss, DrafterObjective
from dflash_ray.training.recipe import recipe_of
from dflash_ray.training.shards import ShardStore
from dflash_ray.training.tap_sources import OnlineTaps, StoredTaps, TapSource
from dflash_ray.training.trainer import Trainer

_POINT_EVERY_STEPS = 10
_MAX_HELD_OUT = 16  # conversations that the held-out curve is measured on


def fit(config: TrainingConfig) -> int:
    """Trains until fit.max_steps and leaves the drafter in fit/drafter. Returns the number of steps left out.

    Raises ValueError when the shards or the checkpoint do not suit the configuration or training diverges,
    DiskFullError when a checkpoint has no room.
    """
    if config.evaluate.answers is not None:  # what is wrong with them is said now, not at their first use
        choose_answers(config.evaluate, config.drafter.tap_layer_ids, resolve_target(config.target))
    return fit_worker(config) if config.fit.num_workers == 1 else _fit_on_cluster(config)


def _fit_on_cluster(config: TrainingConfig) -> int:
    """The same code on every Ray Train worker; the work_dir must be on a file system that all nodes see."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    from dflash_ray.training.cluster import cluster

    section = config.fit
    ShardStore(*config.shard_dirs)  # what is wrong with the shards is said before workers start
    absolute = config.with_absolute_paths()
    trainer = TorchTrainer(
        _cluster_worker,  # type: ignore[arg-type] # what it returns is the result's return_value
        train_loop_config={"config": absolute.model_dump_json()},
        scaling_config=ScalingConfig(
            num_workers=section.num_workers,
            use_gpu=section.device == "cuda",
            resources_per_worker={"CPU": section.cpus_per_worker, **({"GPU": 1} if section.device == "cuda" else {})},
        ),
        run_config=RunConfig(
            name="fit",
            storage_path=str(absolute.fit_dir / "ray"),
            failure_config=FailureConfig(max_failures=section.max_failures),
        ),
    )
    with cluster():
        try:
            result: Any = trainer.fit()
        except WorkerGroupError as error:
            failures = "; ".join(f"worker {rank}: {failure}" for rank, failure in error.worker_failures.items())
            raise ValueError(f"training failed: {failures}") from error
    if isinstance(result.return_value, str):
        raise RunError(result.return_value)
    return int(result.return_value)


def _cluster_worker(values: dict[str, str]) -> int | str:
    """Steps left out, or the text of what ended the run on all workers: Ray would start them again for an error."""
    from ray import train
    from ray.train.torch import prepare_model

    context = train.get_context()
    config = TrainingConfig.model_validate_json(values["config"])
    # The only buffers are frozen ones, equal everywhere.
    wrap = partial(prepare_model, parallel_strategy_kwargs={"broadcast_buffers": False})
    try:
        return fit_worker(config, wrap, context.get_world_rank(), context.get_world_size())
    except RunError as error:
        return str(error)


def fit_worker(
    config: TrainingConfig,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """One worker's whole run; rank 0 also writes checkpoints, curves and the drafter. Returns the steps left out."""
    if config.fit.num_threads:
        torch.set_num_threads(config.fit.num_threads)
    if config.fit.device == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    target = resolve_target(config.target)
    store = ShardStore(*config.shard_dirs)
    if store.layout.target != target.fingerprint:
        raise ValueError(f"target: {', '.join(map(str, config.shard_dirs))} was answered by other weights")
    train, held_out = _split(store, config.prompts.held_out_fraction)
    vocabulary = draft_vocabulary(
        (store.conversations[i] for i in train), config.drafter.draft_vocab_size, target.config.vocab_size
    )
    start = None if config.fit.init_drafter is None else load_drafter(config.fit.init_drafter, target)
    objective, config_values = _build_objective(config, target, vocabulary, store, start)
    wrapped = wrap(objective) if wrap else objective.to(config.fit.device)
    state_file = config.fit_dir / "state.safetensors"
    recipe = recipe_of(config, target.fingerprint, store.fingerprint, None if start is None else start.fingerprint)
    trainer = Trainer(objective, wrapped, config.fit, config.seed, recipe, state_file, rank, world_size)
    trainer.resume()
    t2d = torch.full((target.config.vocab_size,), IGNORE)
    t2d[vocabulary] = torch.arange(len(vocabulary))
    source = BatchSource(
        store,
        train,
        t2d,
        config.fit.anchors_per_conversation,
        config.drafter.block_size,
        _tap_source(config, store, target),
        len(config.drafter.tap_layer_ids),
    )
    if rank != 0:
        trainer.run(source, lambda step, result: None)
        return trainer.num_skipped
    _record(config, store, world_size, trainer.changes)

    def save() -> None:
        _save_trained(config, config_values, trainer.averaged, vocabulary)

    progress = _Progress(config, target, trainer, source, held_out, save)
    try:
        trainer.run(source, progress.report)
    finally:
        progress.close()
    save()
    return trainer.num_skipped


def _split(store: ShardStore, fraction: float) -> tuple[list[int], list[int]]:
    """Conversations to train on and held-out ones; answers of fewer than two tokens train nothing."""
    train: list[int] = []
    held_out: list[int] = []
    for index, conversation in enumerate(store.conversations):
        if len(conversation.token_ids) - conversation.prompt_len >= 2:
            (held_out if conversation.prompt.is_held_out(fraction) else train).append(index)
    if not train:
        raise ValueError("the shards hold no conversation to train on")
    return train, held_out


def _tap_source(config: TrainingConfig, store: ShardStore, target: TargetCheckpoint) -> TapSource:
    """Taps of the drafter's layers, with distillation also those of the last one."""
    layer_ids = config.drafter.tap_layer_ids
    if config.fit.distillation_weight:
        layer_ids = (*layer_ids, target.config.num_hidden_layers - 1)
    if config.fit.online_taps:
        return OnlineTaps(store, target, layer_ids, getattr(torch, config.engine.dtype), config.fit.device)
    return StoredTaps(store, layer_ids)


def _build_objective(
    config: TrainingConfig,
    target: TargetCheckpoint,
    vocabulary: Tensor,
    store: ShardStore,
    start: DrafterCheckpoint | None,
) -> tuple[DrafterObjective, dict[str, object]]:
    """The drafter before its first step, that of fit.init_drafter where there is one, and its config.json."""
    config.drafter.check_target(target.config.num_hidden_layers, target.config.vocab_size)
    is_reduced = len(vocabulary) < target.config.vocab_size
    values = drafter_config_values(config.drafter, target, len(vocabulary) if is_reduced else None)
    longest = max(len(conversation.token_ids) for conversation in store.conversations)
    objective = DrafterObjective(parse_dflash_config(values, "drafter"), config.fit, target, vocabulary, longest)
    if start is None:
        initialise_new(objective.projector, objective.network, config.drafter, target)
    else:
        initialise_from_drafter(objective, start, vocabulary)
    return objective, values


def _save_trained(
    config: TrainingConfig, config_values: dict[str, object], weights: dict[str, Tensor], vocabulary: Tensor
) -> None:
    """Writes averaged weights in the published layout, bfloat16. Raises RunError for ones that are not finite."""
    tensors = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in weights.items()}
    check_finite(tensors, config.trained_dir)
    if config_values.get("draft_vocab_size") is not None:
        tensors["d2t"] = vocabulary - torch.arange(len(vocabulary))
    save_drafter(config.trained_dir, config_values, tensors)


def _record(config: TrainingConfig, store: ShardStore, world_size: int, changes: list[dict[str, Any]]) -> None:
    """What the run is made of: recipe with its seeds, changes under way, versions, and hashes of the shards."""
    record = {
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "num_workers": world_size,
        "changes": changes,
        "versions": {name: version(name) for name in ("torch", "transformers", "dflash-ray")},
        "shards": {name: sha256_of(path) for name, path in store.paths.items()},
    }
    write_text(config.fit_dir / "run.json", json.dumps(record, indent=2) + "\n")


class _Progress:
    """Bar and curves of rank 0; measures held-out conversations and recorded answers from time to time.

    Args:
        save: writes the drafter with the averaged weights of this moment.
    """

    def __init__(
        self,
        config: TrainingConfig,
        target: TargetCheckpoint,
        trainer: Trainer,
        source: BatchSource,
        held_out: list[int],
        save: Callable[[], None],
    ) -> None:
        self._config = config
        self._target = target
        self._trainer = trainer
        self._save = save
        self._bar = tqdm(total=config.fit.max_steps, initial=trainer.step, desc="fit", unit="step")
        self._curves = Curves(config.fit_dir, trainer.step)
        self._held_out = source.at(held_out[:_MAX_HELD_OUT], config.seed) if held_out else None

    def report(self, step: int, result: BlockLoss | None) -> None:
        self._bar.update()
        if result is None:
            self._bar.set_postfix(left_out=self._trainer.num_skipped)
        elif step % _POINT_EVERY_STEPS == 0:
            self._add(step, "train", result)
            self._bar.set_postfix(loss=f"{result.loss.item():.3f}", tau=f"{result.acceptance_length():.2f}")
        if step % self._config.fit.held_out_every_steps == 0:
            if self._held_out is not None:
                self._add(step, "held_out", self._trainer.measure(self._held_out))
            if self._config.evaluate.answers is not None:
                self._follow(step)

    def _add(self, step: int, part: str, result: BlockLoss) -> None:
        slots = {f"slot_{k}_accuracy": share for k, share in enumerate(result.slot_accuracy(), start=1)}
        self._curves.add(step, part, loss=result.loss.item(), acceptance_length=result.acceptance_length(), **slots)

    def _follow(self, step: int) -> None:
        """The acceptance that evaluate.answers would decode with, at the drafter's own block size."""
        self._save()
        drafter = load_drafter(self._config.trained_dir, self._target)
        results = follow_whole_blocks(self._config, drafter, self._target)
        lengths = {category: result.acceptance_length for category, result in results.items()}
        self._curves.add(step, "followed", acceptance_length=lengths[ALL], by_category=lengths)

    def close(self) -> None:
        self._bar.close()
        self._curves.close()
