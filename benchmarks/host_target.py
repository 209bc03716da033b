"""The target group and the drafters around canned verdicts and drafts: each takes and gives the bytes of its wires."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import torch
from host_canned import CannedDrafts, CannedRunner, RingStore
from host_cases import FINGERPRINT, Case, Clock, Texts

from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.arrivals import Arrivals
from dflash_ray.drafter.drafts import Drafts
from dflash_ray.drafter.feature_sources import FeatureSource, FeatureSources
from dflash_ray.drafter.sessions import DraftSessions
from dflash_ray.models.context_features import rows_per_piece
from dflash_ray.pb import drafter_pb2, target_pb2
from dflash_ray.target_group.codec import decode_step, encode_result
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.feature_streams import FeatureStreams
from dflash_ray.target_group.step import StepInput
from dflash_ray.target_group.step_channel import StepChannel
from dflash_ray.target_group.step_check import StepLimits, check_step

LAST = 2**64 - 1  # a sequence whose closing ends the other ranks


class _Lead:
    """Tells the other ranks, on the clock."""

    def __init__(self, channel: StepChannel, clock: Clock) -> None:
        self._channel, self._clock = channel, clock

    def send(self, step: StepInput) -> None:
        self._clock.to("target to ranks")
        self._channel.send(step)
        self._clock.to("target batch")


def _engine(
    case: Case, runner: CannedRunner, features: FeatureStore | None = None, lead: _Lead | None = None
) -> Engine:
    target = case.config().target
    max_model_len = case.config().model.max_model_len
    assert max_model_len is not None
    return Engine(runner, target.num_pages, target.page_size, max_model_len, features=features, lead=lead)


class Target:
    """Engine and codec of rank 0, and the features' streams."""

    def __init__(self, case: Case, clock: Clock, texts: Texts, channel: StepChannel | None = None) -> None:
        config = case.config()
        self._clock = clock
        self._limits = StepLimits(
            config.target.max_batch_tokens, config.model.max_model_len or 0, texts.tokenizer.vocab_size
        )
        self._runner = CannedRunner(case, clock, texts)
        self._dtype, self._width = getattr(torch, case.dtype), case.width
        self._store = RingStore(case.prompt_width, self._dtype)
        self.engine = _engine(case, self._runner, self._store, None if channel is None else _Lead(channel, clock))
        rows = rows_per_piece(case.prompt_width, self._dtype)
        self.features = FeatureStreams(self.engine.read_features, rows, "target", FINGERPRINT)

    def start(self) -> None:
        """Prompts are over: features have their width from here on."""
        self._runner.is_starting = False
        self._store.widen(self._width, self._dtype)
        self.features._rows_per_piece = rows_per_piece(self._width, self._dtype)

    def take(self, data: bytes) -> bytes:
        """The answer to a message."""
        self._clock.to("target codec")
        request = target_pb2.TargetRequest.FromString(data)
        step = decode_step(request.step)
        check_step(step, self._limits)
        self.features.receive(request.step)
        self._clock.to("target batch")
        output = self.engine.step(step)
        self._clock.to("target codec")
        if output.features is not None:
            ends = (output.features.starts + output.features.num_rows).tolist()
            self.features.publish(output.step_id, output.features.sequence_ids.tolist(), ends)
        answer = target_pb2.TargetResponse(result=encode_result(output)).SerializeToString()
        self._clock.to(None)
        return answer


class _WiredSource(FeatureSource):
    """A features' stream whose messages the loop hands over."""

    async def _run(self) -> None:
        await asyncio.Event().wait()


class _WiredSources(FeatureSources):
    """One stream to the one target group."""

    def open(self, address: str, stream: int) -> FeatureSource:
        if not self._sources:
            source = _WiredSource(address, self._hello, self._width, 2**31 - 1, self._arrivals)
            self._sources[address] = source
        return next(iter(self._sources.values()))


class Drafter:
    """One drafter: its sessions, its codec, and its features' stream from the target."""

    def __init__(self, case: Case, clock: Clock, texts: Texts, target: Target) -> None:
        self._clock = clock
        self._method = CannedDrafts(case, clock, texts)
        self._width = case.width
        arrivals = Arrivals()
        self._sources = _WiredSources("drafter", FINGERPRINT, case.prompt_width, 2**31 - 1, arrivals)
        sessions = DraftSessions(self._method, 2**40)
        self._drafts = Drafts(sessions, arrivals, self._sources, Watchdog(1e6, "drafts"), lambda start, end: None)
        self._source = self._sources.open("target", 0)
        self._wire = asyncio.create_task(self._carry(target.features))
        self.num_feature_bytes = 0

    def start(self) -> None:
        """As the target's."""
        self._method.feature_width = self._sources._width = self._source._width = self._width

    async def take(self, data: bytes) -> bytes:
        """The reply to a request, once the rows that it waits for are here."""
        request = drafter_pb2.DrafterRequest.FromString(data)
        reply = await self._drafts.answer(0, request.draft)
        return drafter_pb2.DrafterResponse(drafts=reply).SerializeToString()

    async def _carry(self, features: FeatureStreams) -> None:
        """The target's end of the stream, and the way from there."""
        async for response in features.serve(self._requests(), None):  # type: ignore[arg-type]
            data = response.SerializeToString()
            self.num_feature_bytes += len(data)
            self._source._take(target_pb2.FeaturesResponse.FromString(data))

    async def _requests(self) -> AsyncIterator[target_pb2.FeaturesRequest]:
        async for request in self._source._requests():
            yield target_pb2.FeaturesRequest.FromString(request.SerializeToString())

    async def close(self) -> None:
        self._wire.cancel()
        await self._drafts.close()


class Rank:
    """Another rank of a group: the engine without what rank 0 alone does."""

    def __init__(self, case: Case, clock: Clock, texts: Texts, channel: StepChannel) -> None:
        self._clock, self._channel = clock, channel
        self._runner = CannedRunner(case, Clock(), texts)
        self._engine = _engine(case, self._runner)

    def follow(self) -> bool:
        """A step; False after the last one."""
        step = self._channel.receive()
        if LAST in step.close:
            return False
        self._clock.to("rank")
        self._engine.step(step)
        self._clock.to(None)
        return True


def dismiss(channel: StepChannel) -> None:
    """Rank 0: there is no further step."""
    channel.send(StepInput(close=np.array([LAST], dtype=np.uint64)))
