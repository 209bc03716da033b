"""A rank's part of every pass: forward, then the verdict that all ranks reach together."""

from __future__ import annotations

from dflash_ray.core.watchdog import Watchdog
from dflash_ray.sampling.logprobs import Logprobs, token_logprobs
from dflash_ray.sampling.plan import SequencePlan, pack_plan, unpack_plan
from dflash_ray.sampling.shards import ShardGroup
from dflash_ray.sampling.verify import SequenceOutcome, verify
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.model import RankModel, StepHidden
from dflash_ray.target_group.tensor_parallel import StepChannel

_SCORED_AT_ONCE = 128  # rows of logits, each as long as the vocabulary


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

    def score(self, hidden: StepHidden, batch: StepBatch) -> Logprobs:
        """Log-probabilities of the batch's scored tokens."""
        scores = Logprobs()
        if hidden.scored is None:
            return scores
        num_top = int(batch.num_top[0])
        for start in range(0, len(batch.scored_rows), _SCORED_AT_ONCE):
            stop = start + _SCORED_AT_ONCE
            logits = self._model.shard_logits(hidden.scored[start:stop])
            tokens = batch.scored_tokens[start:stop].tolist()
            scores.extend(token_logprobs(logits, self._model.vocab_start, tokens, num_top, self._shards))
        return scores

    def follow(self, watchdog: Watchdog) -> None:
        """Other ranks: takes part in every step until the process ends. Waiting for the next one may take for ever."""
        while True:
            flat_batch, flat_plan = self._channel.receive()
            with watchdog.watch():
                batch = StepBatch.unpack(flat_batch)
                hidden = self._model.forward(batch)
                plan = unpack_plan(flat_plan)
                if plan:
                    self.verify(hidden, plan)
                self.score(hidden, batch)
