"""Fits a drafter: random anchors, weighted cross-entropy over the slots, AdamW, cosine, EMA; resumes where it stopped.

Weights of the slots: `decay` falls exponentially (DFlash paper, eq. 4); `dpace` (arXiv 2605.18810) weights a slot by
the chance that the walk reaches it and goes on.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_ray.models.dflash import ContextProjector, DflashConfig, DflashNetwork, rope_tables
from dflash_ray.models.drafter_checkpoint import ARCHITECTURE, load_drafter, parse_dflash_config, save_drafter
from dflash_ray.models.target_checkpoint import TargetCheckpoint
from dflash_ray.training.capture import TapStore
from dflash_ray.training.config import TrainingConfig
from dflash_ray.training.dataset import Conversation
from dflash_ray.training.parallel import forward_blocks

_IGNORE = -100


class Trainer:
    """Owns the weights, the optimiser and the order of the data of one run."""

    def __init__(self, config: TrainingConfig, target: TargetCheckpoint, vocabulary: Tensor) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.config_values = drafter_config_values(config, target, len(vocabulary))
        self.drafter_config: DflashConfig = parse_dflash_config(self.config_values, "training")
        torch.manual_seed(config.seed)
        self.projector = ContextProjector(self.drafter_config)
        self.network = DflashNetwork(self.drafter_config)
        if config.init_drafter is None:
            initialise_from_target(self.projector, self.network, config, target)
        else:
            self._load_weights(load_drafter(config.init_drafter, target).weights)
        self.embedding = target.load_embedding()
        self.head = target.load_head()[vocabulary].to(torch.bfloat16 if config.bf16 else torch.float32)
        self.t2d = torch.full((self.embedding.shape[0],), _IGNORE)
        self.t2d[vocabulary] = torch.arange(len(vocabulary))
        self.rope = rope_tables(self.drafter_config, config.max_length + config.block_size)
        self.parameters = dict(self._named_parameters())
        self.ema = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.step = 0

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {**dict(self.projector.named_parameters()), **dict(self.network.named_parameters())}

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._named_parameters().items():
                parameter.copy_(weights[name])

    def fit(self, conversations: list[Conversation], indices: list[int], store: TapStore) -> None:
        """Trains until max_steps, with a checkpoint every `checkpoint_every_s` and at the end."""
        self.resume()
        saved_at = time.monotonic()
        while self.step < self.config.max_steps:
            started = time.monotonic()
            loss, accuracy = self.train_step(conversations, self._draw_batch(conversations, indices), store)
            self.step += 1
            if self.step % 10 == 0:
                seconds = time.monotonic() - started
                self._log(step=self.step, loss=loss, slot_accuracy=accuracy, step_seconds=seconds)
            if time.monotonic() - saved_at > self.config.checkpoint_every_s:
                self.save()
                saved_at = time.monotonic()
        self.save()

    def _draw_batch(self, conversations: list[Conversation], indices: list[int]) -> list[int]:
        """Conversations of similar length, chosen by the step alone so that a resumed run draws the same ones."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        size = self.config.conversations_per_step
        pool = [indices[i] for i in torch.randperm(len(indices), generator=generator)[: size * 8].tolist()]
        pool.sort(key=lambda i: len(conversations[i].token_ids))
        start = int(torch.randint(max(1, len(pool) - size + 1), (1,), generator=generator))
        return pool[start : start + size]

    def train_step(
        self, conversations: list[Conversation], batch: list[int], store: TapStore
    ) -> tuple[float, list[float]]:
        """One optimiser step. Returns the loss and the share of right tokens in each draft slot."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        taps = nn.utils.rnn.pad_sequence([store.get(i) for i in batch], batch_first=True)
        tokens = nn.utils.rnn.pad_sequence([conversations[i].token_ids for i in batch], batch_first=True)
        anchors, labels = self._draw_anchors(conversations, batch, tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            losses, is_right = self._block_losses(taps.float(), tokens, anchors, labels)
        loss = self._weighted(losses, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)
        self.optimizer.step()
        self._update_ema()
        valid = labels != _IGNORE
        accuracy = (is_right & valid).sum((0, 1)) / valid.sum((0, 1)).clamp(min=1)
        return loss.item(), [round(x, 3) for x in accuracy.tolist()]

    def _draw_anchors(
        self, conversations: list[Conversation], batch: list[int], tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Anchors [C, A] among answer tokens that have a successor, and labels [C, A, B-1] (_IGNORE: no loss).

        Labels are indices into the draft vocabulary, or minus two minus ... never: tokens outside it carry no loss.
        """
        generator = torch.Generator().manual_seed(self.config.seed * 7_000_003 + self.step)
        count, slots = self.config.anchors_per_conversation, self.config.block_size - 1
        anchors = torch.zeros(len(batch), count, dtype=torch.long)
        labels = torch.full((len(batch), count, slots), _IGNORE)
        for row, index in enumerate(batch):
            first, last = conversations[index].prompt_len, len(conversations[index].token_ids) - 1
            anchors[row] = torch.randint(first, last, (count,), generator=generator)
            at = anchors[row][:, None] + torch.arange(1, slots + 1)
            inside = at <= last
            labels[row] = torch.where(inside, self.t2d[tokens[row][at.clamp(max=last)]], _IGNORE)
        return anchors, labels

    def _block_losses(self, taps: Tensor, tokens: Tensor, anchors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every slot, float32 [C, A, B-1], and where the likeliest token is right."""
        inputs = torch.full((*anchors.shape, self.config.block_size), self.config.mask_token_id)
        inputs[..., 0] = tokens.gather(1, anchors)
        hidden = forward_blocks(
            self.network, self.projector(taps), anchors, F.embedding(inputs, self.embedding), self.rope
        )
        logits = F.linear(hidden[:, :, 1:].to(self.head.dtype), self.head).float()
        losses = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=_IGNORE, reduction="none")
        return losses.view(labels.shape), logits.argmax(-1) == labels

    def _weighted(self, losses: Tensor, labels: Tensor) -> Tensor:
        valid = (labels != _IGNORE).float()
        if self.config.loss == "decay":
            weights = torch.exp(-torch.arange(losses.shape[-1]) / self.config.loss_decay) * valid
        else:
            reach = torch.cumprod(0.5 + 0.5 * torch.exp(-losses.detach()), dim=-1) * valid
            weights = reach.flip(-1).cumsum(-1).flip(-1) * valid
        return (losses * weights).sum() / weights.sum().clamp(min=1.0)

    def _learning_rate(self) -> float:
        config = self.config
        if self.step < config.warmup_steps:
            return config.learning_rate * (self.step + 1) / config.warmup_steps
        progress = (self.step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return config.learning_rate * (
            config.final_learning_rate_fraction + (1 - config.final_learning_rate_fraction) * cosine
        )

    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.ema[name].lerp_(parameter, 1 - decay)

    def save(self) -> None:
        """Writes the state atomically: a kill at any moment leaves the last whole checkpoint."""
        state = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        state |= {f"ema.{name}": tensor for name, tensor in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                state[f"adam.{key}.{name}"] = value
        state["step"] = torch.tensor(self.step)
        partial = self._state_file.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in state.items()}, partial)
        partial.replace(self._state_file)
        self.export(self.config.work_dir / "export")

    def resume(self) -> None:
        """Goes on from the last checkpoint of the work directory, if there is one."""
        if not self._state_file.exists():
            return
        state = load_file(self._state_file)
        self._load_weights({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        for name, parameter in self.parameters.items():
            self.ema[name].copy_(state[f"ema.{name}"])
            self.optimizer.state[parameter] = {
                key: state[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step = int(state["step"])

    @property
    def _state_file(self) -> Path:
        return self.config.work_dir / "trainer.safetensors"

    def export(self, directory: Path) -> None:
        """Writes the averaged weights in the published layout, bfloat16."""
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in self.ema.items()}
        weights["d2t"] = self.vocabulary - torch.arange(len(self.vocabulary))
        save_drafter(directory, self.config_values, weights)

    def _log(self, **fields: Any) -> None:
        line = json.dumps({"time": round(time.time(), 1), **fields})
        print(line, flush=True)
        with (self.config.work_dir / "log.jsonl").open("a") as log:
            log.write(line + "\n")


def drafter_config_values(config: TrainingConfig, target: TargetCheckpoint, draft_vocab_size: int) -> dict[str, Any]:
    """config.json of the drafter: the target's layer shape, with as many layers as are initialised."""
    source = target.config
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "hidden_size": source.hidden_size,
        "num_hidden_layers": len(config.init_layer_ids),
        "num_attention_heads": source.num_attention_heads,
        "num_key_value_heads": source.num_key_value_heads,
        "head_dim": getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        "intermediate_size": source.intermediate_size,
        "rms_norm_eps": source.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": source.rope_parameters["rope_theta"]},
        "vocab_size": source.vocab_size,
        "max_position_embeddings": source.max_position_embeddings,
        "hidden_act": "silu",
        "num_target_layers": source.num_hidden_layers,
        "block_size": config.block_size,
        "draft_vocab_size": draft_vocab_size,
        "dflash_config": {
            "target_layer_ids": list(config.tap_layer_ids),
            "mask_token_id": config.mask_token_id,
        },
    }


def initialise_from_target(
    projector: ContextProjector, network: DflashNetwork, config: TrainingConfig, target: TargetCheckpoint
) -> None:
    """Draft layers start as target layers, and the context feature as the mean of the taps."""
    base = target.load_model().model
    with torch.no_grad():
        projector.fc.weight.zero_()
        for block in projector.fc.weight.chunk(len(config.tap_layer_ids), dim=1):
            block.fill_diagonal_(1.0 / len(config.tap_layer_ids))
        middle = base.layers[config.tap_layer_ids[len(config.tap_layer_ids) // 2]]
        projector.hidden_norm.weight.copy_(middle.input_layernorm.weight)
        network.norm.weight.copy_(base.norm.weight)
        for layer, source_id in zip(network.layers, config.init_layer_ids, strict=True):
            layer.load_state_dict(base.layers[source_id].state_dict(), strict=False)
