"""One training run as a typed tree: every figure that a result depends on. A step reads the root and its section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, field_validator, model_validator

from dflash_ray.config import BUILTIN_MODEL, DflashRayConfig, TrafficConfig, parse_config, read_values, validate

STEMS = (
    "Summarize the following",
    "Translate the following sentence into",
    "Write a Python function that",
    "Explain why",
    "Write a short story about",
    "What is the difference between",
    "Solve the following problem step by step:",
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSection(_Section):
    """The target's engine inside a step's own process, one rank."""

    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = Field(0, ge=0, description="torch threads; 0 leaves torch's choice")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: int = Field(2048, ge=16)
    page_size: int = Field(16, ge=1)
    kv_cache_tokens: int = Field(32768, ge=64)
    max_batch_tokens: int = Field(512, ge=16, description="rows of one target pass")

    def serving_config(self, target: str) -> DflashRayConfig:
        """The same settings as the tree that the target's modules read."""
        model = {"path": target, "dtype": self.dtype, "max_model_len": self.max_model_len}
        keys = {"device", "page_size", "kv_cache_tokens", "max_batch_tokens"}
        router = {"max_running": 1, "draft_tokens": 0}  # no router: the job shares out the rows itself
        return parse_config({"model": model, "target": self.model_dump(include=keys), "router": router}, "engine")


class Dflash2Section(_Section):
    """What DFlash 2 adds to the drafter; names as in the published config.json."""

    conv_kernel_size: int = Field(2, ge=1)
    conv_group_size: int = Field(16, ge=1)
    selector_rank: int = Field(64, ge=1)
    selector_top_k: int = Field(16, ge=1, le=256)
    factorised: bool = Field(False, description="codebooks as projections of the target's embedding and head")


class DrafterSection(_Section):
    """Shape of the drafter; the names are those of the published config.json where it has them."""

    tap_layer_ids: tuple[NonNegativeInt, ...] = Field((1, 14, 27), min_length=1)
    init_layer_ids: tuple[NonNegativeInt | None, ...] = Field(
        (None, None, None), min_length=1, description="one a layer: null starts at random, an id as that target layer"
    )
    block_size: int = Field(8, ge=2)
    mask_token_id: int = Field(4, ge=0)
    draft_vocab_size: int | None = Field(8192, ge=2, description="most frequent answer tokens; null: all of them")
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    sliding_window: int | None = Field(None, ge=1)
    is_causal: bool | None = Field(None, description="inside the block; null: sliding layers only")
    dflash2: Dflash2Section | None = Field(None, description="convolutions and selector; null: DFlash")

    @model_validator(mode="after")
    def _check(self) -> DrafterSection:
        kinds = self.layer_types or ()
        if kinds and len(kinds) != len(self.init_layer_ids):
            raise ValueError("layer_types must have one entry for each of init_layer_ids")
        if "sliding_attention" in kinds and self.sliding_window is None:
            raise ValueError("sliding_window is needed by layer_types")
        return self

    def check_target(self, num_layers: int, vocab_size: int) -> None:
        """Raises ValueError when the target lacks a tapped or initial layer, or the mask token."""
        for key in ("tap_layer_ids", "init_layer_ids"):
            for layer_id in getattr(self, key):
                if layer_id is not None and layer_id >= num_layers:
                    raise ValueError(f"drafter.{key}: {layer_id} is none of the target's layers, 0 to {num_layers - 1}")
        if self.mask_token_id >= vocab_size:
            raise ValueError(
                f"drafter.mask_token_id: {self.mask_token_id} is none of the target's tokens, 0 to {vocab_size - 1}"
            )


class SelfGeneratedSection(_Section):
    """Prompts that the target itself continues its chat template's user turn with (Magpie, arXiv 2406.08464)."""

    num_prompts: int = Field(ge=1)
    stems: tuple[str, ...] = Field(STEMS, description="beginnings that steer the task; used in turn with none")
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)


class PromptsSection(_Section):
    files: tuple[Path, ...] = Field((), description="JSONL with `prompt` or `messages`, and optionally `source`")
    prompts_per_file: int | None = Field(None, ge=1, description="of each file at most these, by hash; null: all")
    traffic: TrafficConfig | None = Field(None, description="prompts of users, as gateway.traffic records them")
    self_generated: SelfGeneratedSection | None = None
    near_duplicate_similarity: float | None = Field(
        0.8, gt=0, le=0.95, description="Jaccard, over runs of five characters, from which on; null keeps all"
    )
    held_out_fraction: float = Field(0.02, ge=0, lt=1)


class RegenerateSection(_Section):
    max_new_tokens: int = Field(512, ge=2)
    max_length: int = Field(768, ge=4, description="prompt and answer; longer prompts are left out")
    temperatures: tuple[float, ...] = Field((0.0, 0.7), min_length=1, description="one a prompt, by its hash")
    with_taps: bool = Field(True, description="store the taps; without them the shards are small, see fit.online_taps")
    with_last_layer: bool = Field(False, description="store the last layer too, for fit.distillation_weight")
    shard_conversations: int = Field(128, ge=1)
    num_workers: int = Field(1, ge=1, description="Ray Data actors, which share the work_dir; 1 runs without Ray")
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)


class CaptureSection(_Section):
    """Conversations that were answered elsewhere and lack taps."""

    conversations: tuple[Path, ...] = Field((), description="JSONL with prompt, response_ids, source, temperature")


class FitSection(_Section):
    shards: tuple[Path, ...] = Field((), description="directories to train on; none: those of work_dir alone")
    online_taps: bool = Field(False, description="the target runs beside the drafter; the shards need no taps")
    init_drafter: Path | None = Field(None, description="drafter directory to go on from, instead of init_layer_ids")
    max_steps: int = Field(2400, ge=0)
    conversations_per_step: int = Field(8, ge=1, description="over all workers")
    anchors_per_conversation: int = Field(64, ge=1)
    warmup_steps: int = Field(60, ge=1)
    optimizer: Literal["adamw", "muon"] = Field("muon", description="muon: for matrices; the rest is AdamW's")
    learning_rate: float = Field(6e-3, gt=0)
    final_learning_rate_fraction: float = Field(0.02, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    loss: Literal["decay", "dpace"] = "dpace"
    loss_decay: float = Field(4.0, gt=0, description="slots after which the weight of `decay` has fallen to 1/e")
    selector_weight: float = Field(1.0, ge=0, description="of the selector's loss beside the slots', for DFlash 2")
    distillation_weight: float = Field(0.0, ge=0, le=1, description="share of the divergence from the target's logits")
    held_out_every_steps: int = Field(100, ge=1, description="between measurements on held-out conversations")
    checkpoint_every_s: float = Field(30.0, gt=0)
    max_skipped_steps: int = Field(
        10, ge=1, description="in a row, left out as their loss or gradient is not finite, that end the run"
    )
    changed_keys: tuple[str, ...] = Field(
        (), description="keys such as fit.learning_rate that may differ from those that the checkpoint was made with"
    )
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = Field(0, ge=0, description="torch threads; 0 leaves torch's choice")
    bf16: bool = Field(True, description="on a GPU: autocast to bfloat16; weights and optimiser stay float32")
    num_workers: int = Field(1, ge=1, description="Ray Train workers, which share the work_dir; 1 runs without Ray")
    cpus_per_worker: float = Field(1.0, gt=0)
    max_failures: int = Field(3, ge=0, description="restarts of lost Ray Train workers")

    @field_validator("changed_keys")
    @classmethod
    def _check_changed_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            name = key.removeprefix("fit.")
            if name == key or name == "init_drafter" or name not in cls.model_fields:
                raise ValueError(f"{key} is no key of `fit` that can change under way; write it as fit.learning_rate")
        return keys


class EvaluateSection(_Section):
    drafter: str | None = Field(None, description="directory or builtin:; null is the one of `fit`")
    prompts: Path | None = Field(None, description="JSONL; null is the held-out prompts of `prompts`")
    answers: Path | None = Field(None, description="shards of greedy answers, followed in place of decoding `prompts`")
    prompts_per_category: int = Field(20, ge=1)
    max_new_tokens: int = Field(128, ge=2)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    block_sizes: tuple[int, ...] = Field((4, 8, 16), description="anchor and drafts verified; cut to the drafter's own")
    tree_nodes: tuple[int, ...] = Field((7, 15), description="sizes of trees of drafts, simulated at temperature 0")
    confidence: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(2000, ge=100)


class ExportSection(_Section):
    output_dir: Path = Field(Path("drafter"), description="where the drafter and its model card go")
    name: str = "DFlash drafter"
    license: str = "unspecified"


class TrainingConfig(_Section):
    """Root of the tree. Paths are relative to the working directory."""

    target: str = Field(BUILTIN_MODEL, description="as model.path of the application")
    work_dir: Path = Field(Path("training"), description="prompts, shards, checkpoints and results")
    seed: int = Field(0, ge=0, lt=1 << 20)
    engine: EngineSection = EngineSection()
    drafter: DrafterSection = DrafterSection()
    prompts: PromptsSection = PromptsSection()
    regenerate: RegenerateSection = RegenerateSection()
    capture: CaptureSection = CaptureSection()
    fit: FitSection = FitSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.evaluate.answers is not None and any(self.evaluate.temperatures):
            raise ValueError("evaluate.temperatures must be [0.0] with evaluate.answers, which are greedy")
        if self.regenerate.max_length > self.engine.max_model_len:
            raise ValueError("regenerate.max_length exceeds engine.max_model_len")
        if self.engine.kv_cache_tokens < self.engine.max_model_len:
            raise ValueError("engine.kv_cache_tokens must hold a sequence of engine.max_model_len")
        return self

    def with_absolute_paths(self) -> TrainingConfig:
        """The same run for processes that start in another directory."""
        target = self.target if self.target.startswith("builtin:") else str(Path(self.target).resolve())
        init_drafter = self.fit.init_drafter and self.fit.init_drafter.resolve()
        shards = tuple(path.resolve() for path in self.fit.shards)
        fit = self.fit.model_copy(update={"init_drafter": init_drafter, "shards": shards})
        answers = self.evaluate.answers and self.evaluate.answers.resolve()
        evaluate = self.evaluate.model_copy(update={"answers": answers})
        work_dir = self.work_dir.resolve()
        return self.model_copy(update={"target": target, "work_dir": work_dir, "fit": fit, "evaluate": evaluate})

    @property
    def prompts_dir(self) -> Path:
        return self.work_dir / "prompts"

    @property
    def shards_dir(self) -> Path:
        """Where `regenerate` and `capture` write."""
        return self.work_dir / "shards"

    @property
    def shard_dirs(self) -> tuple[Path, ...]:
        """What `fit` reads."""
        return self.fit.shards or (self.shards_dir,)

    @property
    def fit_dir(self) -> Path:
        return self.work_dir / "fit"

    @property
    def trained_dir(self) -> Path:
        """The drafter as `fit` leaves it."""
        return self.fit_dir / "drafter"

    @property
    def results_file(self) -> Path:
        return self.work_dir / "evaluation" / "results.json"


def load_training_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Reads a YAML file and applies `key.sub=value` overrides. Raises ConfigError that names the key at fault."""
    return validate(TrainingConfig, read_values(path, overrides), str(path or "config"))
