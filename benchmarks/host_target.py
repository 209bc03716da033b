"""Target group and drafters around canned verdicts and drafts: each takes and gives the bytes of its wires."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
from host_canned import CannedDrafts, CannedRunner, RingStore
from host_cases import FINGERPRINT, Case, Clock, Texts

from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.arrivals import Arrival, Arrivals
from dflash_ray.drafter.drafts import Drafts
from dflash_ray.drafter.sessions import DraftSessions
from dflash_ray.models.context_features import rows_of
from dflash_ray.pb import drafter_pb2, target_pb2
from dflash_ray.target_group.codec import decode_step, encode_result
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.feature_streams import FeatureStreams, _Stream, _Wanted
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
    """Engine and codec of rank 0."""

    def __init__(self, case: Case, clock: Clock, texts: Texts, channel: StepChannel | None = None) -> None:
        config = case.config()
        self._clock = clock
        self._limits = StepLimits(
            config.target.max_batch_tokens, config.model.max_model_len or 0, texts.tokenizer.vocab_size
        )
        self._runner = CannedRunner(case, clock, texts)
        self._store = RingStore(case)
        self.engine = _engine(case, self._runner, self._store, None if channel is None else _Lead(channel, clock))
        self.features = FeatureStreams(self.engine.read_features, self._store.rows_per_piece, "target", FINGERPRINT)
        self.features.lead(1)

    def start(self) -> None:
        """Prompts are over: features have their width from here on."""
        self._runner.is_starting = self._store.is_starting = False

    def take(self, data: bytes) -> bytes:
        """The result of a step, whose features are there for the drafters then."""
        self._clock.to("target codec")
        request = target_pb2.TargetRequest.FromString(data)
        step = decode_step(request.step)
        check_step(step, self._limits)
        self._clock.to("target features")
        self.features.receive(request.step)
        self._clock.to("target batch")
        output = self.engine.step(step)
        self._clock.to("target features")
        kept = output.features
        if kept is not None:
            self.engine.keep_features(kept)
            ends = (kept.starts + kept.num_rows).tolist()
            self.features.publish(1, output.step_id, kept.sequence_ids.tolist(), ends)
        self._clock.to("target codec")
        result = target_pb2.TargetResponse(result=encode_result(output)).SerializeToString()
        self._clock.to(None)
        return result


class _AtOnce(Executor):
    """Runs what it is given where it is given."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **named))
        return future


class _Source:
    """A drafter's stream of features without a socket, both ends of it."""

    def __init__(self, target: Target, arrivals: Arrivals, method: CannedDrafts) -> None:
        self._streams = target.features
        self._stream = _Stream()
        self._streams._streams.add(self._stream)
        self._arrivals = arrivals
        self._method = method
        self._by_number: dict[int, Arrival] = {}

    def open(self, address: str, stream: int) -> _Source:
        return self

    def subscribe(self, epoch: int, step_id: int, wanted: list[tuple[Arrival, int]]) -> None:
        for arrival, sequence_id in wanted:
            arrival.is_coming = True
            number = len(self._by_number)
            self._by_number[number] = arrival
            self._streams._subscribe(self._stream, number, _Wanted(epoch, step_id, sequence_id, arrival.end))

    def unsubscribe(self, arrivals: list[Arrival]) -> None:
        """Nothing here is ever opened twice."""

    async def close(self) -> None:
        self._stream.subscriptions.clear()

    def give(self) -> Iterator[bytes]:
        """The target's end: what is there to send."""
        while (response := self._streams._next(self._stream)) is not None:
            yield response.SerializeToString()

    def take(self, data: bytes) -> None:
        """The drafter's end."""
        features = target_pb2.FeaturesResponse.FromString(data).features
        rows = rows_of(features, self._method.feature_width)
        at = 0
        for number, start, count in zip(features.subscription_ids, features.starts, features.num_rows, strict=True):
            self._arrivals.put(self._by_number[number], start, rows[at : at + count])
            at += count


class Drafter:
    """A drafter's sessions, its codec, and its stream of features."""

    def __init__(self, case: Case, clock: Clock, texts: Texts, target: Target) -> None:
        self._clock = clock
        self._method = CannedDrafts(case, clock, texts)
        self._width = case.width
        arrivals = Arrivals()
        self._source = _Source(target, arrivals, self._method)
        sessions, watchdog = DraftSessions(self._method, 2**40), Watchdog(1e6, "a draft")
        self._drafts = Drafts(sessions, arrivals, self._source, watchdog, lambda start, end: None)  # type: ignore[arg-type]
        self._drafts._compute = _AtOnce()  # type: ignore[assignment]
        self.close = self._drafts.close

    def start(self) -> None:
        """As the target's."""
        self._method.feature_width = self._width

    def features(self) -> list[bytes]:
        """Messages of the target for this drafter."""
        self._clock.to("target features")
        messages = list(self._source.give())
        self._clock.to(None)
        return messages

    def take_features(self, data: bytes) -> None:
        self._clock.to("drafter features")
        self._source.take(data)
        self._clock.to(None)

    async def take(self, data: bytes) -> bytes:
        self._clock.to("drafter")
        request = drafter_pb2.DrafterRequest.FromString(data)
        reply = await self._drafts.answer(0, request.draft)
        answer = drafter_pb2.DrafterResponse(drafts=reply).SerializeToString()
        self._clock.to(None)
        return answer


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
