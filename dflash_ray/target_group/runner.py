"""A rank's part of every pass: forward, then the verdict that all ranks reach together."""

from __future__ import annotations

import numpy as np
import torch

from dflash_ray.sampling.columns import PlanColumns
from dflash_ray.sampling.logprobs import Logprobs, token_logprobs
from dflash_ray.sampling.ranks import RankGroup
from dflash_ray.sampling.verify import Verdict, verify
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.model import RankModel, StepHidden
from dflash_ray.target_group.step import Ints

_SCORED_AT_ONCE = 128  # rows of logits, each as long as the vocabulary


class GroupRunner:
    """The model's part on this rank, and what crosses between ranks.

    Attributes:
        device: where it takes a plan's columns.
    """

    def __init__(self, model: RankModel, ranks: RankGroup, device: str = "cpu") -> None:
        self._model = model
        self._ranks = ranks
        self.device = torch.device(device)

    def forward(self, batch: StepBatch, columns: PlanColumns | None = None) -> StepHidden:
        """Runs a pass. What draws may be verified along with it, by its columns; `verify` has the verdict."""
        return self._model.forward(batch)

    def verify(self, hidden: StepHidden, columns: PlanColumns) -> Verdict:
        logits = self._model.rank_logits(hidden.sampled)
        return verify(logits, self._model.vocab_start, columns, self._ranks, hidden.features)

    def move_rows(self, source: Ints, target: Ints) -> None:
        self._model.move_rows(source, target)

    def score(self, hidden: StepHidden, batch: StepBatch) -> Logprobs:
        """Log-probabilities of the batch's scored tokens."""
        if hidden.scored is None:
            return Logprobs()
        num_top = int(batch.num_top[0])
        parts = []
        for start in range(0, len(batch.scored_rows), _SCORED_AT_ONCE):
            stop = start + _SCORED_AT_ONCE
            logits = self._model.rank_logits(hidden.scored[start:stop])
            tokens = batch.scored_tokens[start:stop]
            parts.append(token_logprobs(logits, self._model.vocab_start, tokens, num_top, self._ranks))
        return Logprobs(
            np.concatenate([part.chosen for part in parts]),
            np.concatenate([part.top_ids for part in parts]),
            np.concatenate([part.top_logprobs for part in parts]),
        )
