"""A rank's part of every pass: forward, then the verdict that all ranks reach together."""

from __future__ import annotations

from dflash_ray.core.watchdog import Watchdog
from dflash_ray.sampling.plan import SequencePlan, pack_plan, unpack_plan
from dflash_ray.sampling.shards import ShardGroup
from dflash_ray.sampling.verify import SequenceOutcome, verify
from dflash_ray.target.batch import StepBatch
from dflash_ray.target.model import RankModel, StepHidden
from dflash_ray.target.tensor_parallel import StepChannel


class GroupRunner:
    """This rank's part of a pass; rank 0 drives it and the others follow through the step channel."""

    def __init__(self, model: RankModel, channel: StepChannel, shards: ShardGroup) -> None:
        self._model = model
        self._channel = channel
        self._shards = shards

    def forward(self, batch: StepBatch, plan: list[SequencePlan]) -> StepHidden:
        if self._shards.size > 1:
            self._channel.send(batch.pack(), pack_plan(plan))
        return self._model.forward(batch)

    def verify(self, hidden: StepHidden, plan: list[SequencePlan]) -> list[SequenceOutcome]:
        logits = self._model.shard_logits(hidden.sampled)
        return verify(logits, self._model.vocab_start, plan, self._shards, hidden.features)

    def follow(self, watchdog: Watchdog) -> None:
        """Other ranks: takes part in every step until the process ends. Waiting for the next one may take for ever."""
        while True:
            flat_batch, flat_plan = self._channel.receive()
            with watchdog.watch():
                hidden = self._model.forward(StepBatch.unpack(flat_batch))
                plan = unpack_plan(flat_plan)
                if plan:
                    self.verify(hidden, plan)
