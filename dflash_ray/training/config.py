"""One training run as a typed tree: every figure that a result depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field


class TrainingConfig(BaseModel):
    """Paths are relative to the working directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = "builtin:smollm2"
    conversations: Path = Field(description="JSONL with prompt, response_ids, source and temperature")
    work_dir: Path = Field(description="captured taps and training checkpoints")
    output_dir: Path = Field(description="where the drafter is exported")
    init_drafter: Path | None = Field(None, description="drafter directory to go on from, instead of target layers")

    tap_layer_ids: tuple[int, ...] = (1, 14, 27)
    init_layer_ids: tuple[int, ...] = Field((9, 19, 29), description="target layers that initialise the drafter's")
    block_size: int = 8
    mask_token_id: int = 4
    draft_vocab_size: int = 8192

    held_out_fraction: float = 0.02
    max_length: int = 768
    conversations_per_step: int = 8
    anchors_per_conversation: int = 64
    max_steps: int = 2400
    warmup_steps: int = 60
    learning_rate: float = 1e-3
    final_learning_rate_fraction: float = 0.02
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    loss: Literal["decay", "dpace"] = "dpace"
    loss_decay: float = Field(4.0, description="slots after which the weight of `decay` has fallen to 1/e")
    seed: int = 0
    num_threads: int = 2
    checkpoint_every_s: float = 60.0
    bf16: bool = True


def load_training_config(path: Path) -> TrainingConfig:
    """Reads a YAML file; raises pydantic's ValidationError that names the key at fault."""
    return TrainingConfig.model_validate(yaml.safe_load(path.read_text()))
