"""The trainable part of a drafter with the loss of a batch: one module, so that it can be wrapped for many workers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_ray.models.dflash import ContextProjector, DflashConfig, DflashNetwork, rope_tables
from dflash_ray.models.dflash2 import CandidateSelector, FactorisedSelector, top_candidates
from dflash_ray.models.target_checkpoint import TargetCheckpoint
from dflash_ray.models.target_logits import TargetLogits
from dflash_ray.training.batches import BlockBatch
from dflash_ray.training.config import FitSection
from dflash_ray.training.losses import IGNORE, cross_entropies, decay_weights, divergences, dpace_weights
from dflash_ray.training.parallel import forward_blocks


@dataclass(frozen=True)
class BlockLoss:
    """Of one batch.

    Attributes:
        loss: scalar to minimise.
        is_right: bool [C, A, B-1], where the token that the drafter would choose after the true one is the label.
        valid: bool [C, A, B-1], slots that have a label.
    """

    loss: Tensor
    is_right: Tensor
    valid: Tensor

    def slot_accuracy(self) -> list[float]:
        """Share of right tokens in each slot."""
        right, valid = self.is_right & self.valid, self.valid
        share: list[float] = (right.sum((0, 1)) / valid.sum((0, 1)).clamp(min=1)).tolist()
        return share

    def acceptance_length(self) -> float:
        """Mean length of the right prefixes, the target's own token included, after the true tokens of the shards.

        Serving falls short of it: there a block may start wherever the last one was cut.
        """
        prefixes = torch.cumprod((self.is_right & self.valid).float(), dim=-1).sum(-1)
        return 1.0 + prefixes.mean().item()


class DrafterObjective(nn.Module):
    """Projector and network are trained; embedding, head and the target's last norm are frozen.

    Args:
        vocabulary: int64 [V_d], target ids of the draft vocabulary.
        max_length: longest conversation, for the rotary tables.
    """

    embedding: Tensor  # [V, H]
    head: Tensor  # [V_d, H]
    cos: Tensor  # [positions, d]
    sin: Tensor  # [positions, d]
    vocabulary: Tensor  # [V_d]

    def __init__(
        self, config: DflashConfig, section: FitSection, target: TargetCheckpoint, vocabulary: Tensor, max_length: int
    ) -> None:
        super().__init__()
        self.projector = ContextProjector(config)
        self.network = DflashNetwork(config)
        self._config = config
        self._section = section
        self._freeze("embedding", target.load_embedding() * config.input_embedding_scale)
        self._freeze("head", target.load_head()[vocabulary])
        self._freeze("vocabulary", vocabulary)
        selector = getattr(self.network, "candidate_selector", None)
        if isinstance(selector, FactorisedSelector):
            selector.bind(self.embedding[vocabulary], self.head)
        cos, sin = rope_tables(config, max_length + config.block_size)
        self._freeze("cos", cos)
        self._freeze("sin", sin)
        self._target_logits = TargetLogits(target) if section.distillation_weight else None

    def _freeze(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters by their names in the published layout."""
        return {**dict(self.projector.named_parameters()), **dict(self.network.named_parameters())}

    def forward(self, batch: BlockBatch) -> BlockLoss:
        """Loss of a batch; computes in bfloat16 where the caller's autocast says so."""
        block_ids = torch.full(
            (*batch.anchors.shape, self._config.block_size), self._config.mask_token_id, device=batch.anchors.device
        )
        block_ids[..., 0] = batch.anchor_ids
        features = self.projector(batch.taps.float())
        inputs = F.embedding(block_ids, self.embedding)
        hidden = forward_blocks(self.network, features, batch.anchors, inputs, (self.cos, self.sin))
        # Contiguous, or torch makes a product of its own for every block.
        hidden = hidden[:, :, 1:].contiguous()
        logits = self.network.shape_logits(F.linear(hidden, self.head).float())
        valid = batch.labels != IGNORE
        losses = cross_entropies(logits, batch.labels)
        if self._section.loss == "decay":
            weights = decay_weights(valid, self._section.loss_decay)
        else:
            weights = dpace_weights(losses, valid)
        if self._target_logits is not None and batch.last_hidden is not None:
            share = self._section.distillation_weight
            target_logits = self._target_logits(batch.last_hidden.float(), self.head)
            losses = (1 - share) * losses + share * divergences(logits, target_logits) * valid
        loss = (losses * weights).sum() / weights.sum().clamp(min=1.0)
        if self._config.dflash2 is None:
            return BlockLoss(loss, logits.argmax(-1) == batch.labels, valid)
        selector_loss, choices = self._select(hidden, logits, batch, weights)
        return BlockLoss(loss + self._section.selector_weight * selector_loss, choices == batch.labels, valid)

    def _select(self, hidden: Tensor, logits: Tensor, batch: BlockBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The selector's loss, and its choices int64 [C, A, B-1], each after the true token of the slot before.

        Slots count whose label is a candidate and whose predecessor is in the draft vocabulary.
        """
        selector: CandidateSelector = self.network.candidate_selector
        ids = top_candidates(logits.detach(), selector.top_k)
        # As when serving: an anchor without a row counts as the row before it.
        anchors = (torch.searchsorted(self.vocabulary, batch.anchor_ids, right=True) - 1).clamp(min=0)
        previous = torch.cat((anchors[..., None], batch.labels[..., :-1]), dim=-1)
        scores = selector.scores(hidden, logits, ids, previous.clamp(min=0)[..., None])[..., 0, :]
        is_label = ids == batch.labels[..., None]
        counts = is_label.any(-1) & (previous != IGNORE)
        losses = cross_entropies(scores, torch.where(counts, is_label.int().argmax(-1), IGNORE))
        kept = weights * counts
        loss = (losses * kept).sum() / kept.sum().clamp(min=1.0)
        return loss, ids.gather(-1, scores.argmax(-1, keepdim=True))[..., 0]
