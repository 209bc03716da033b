"""Target group and drafters around canned verdicts and drafts: each takes and gives the bytes of its wires."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
from host_canned import PAGES_AHEAD, CannedDrafts, CannedRunner, DecodedStore
from host_cases import FINGERPRINT, PAGE, Case, Clock, Texts

from dflash_ray.core.draft_blocks import BlockColumns
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.arrivals import Arrivals
from dflash_ray.drafter.drafts import Drafts
from dflash_ray.drafter.feature_sources import FeatureSource
from dflash_ray.drafter.sessions import DraftSessions
from dflash_ray.models.feature_pages import FeaturePages
from dflash_ray.pb import drafter_pb2, target_pb2
from dflash_ray.target_group.codec import decode_step, encode_result
from dflash_ray.target_group.colocated import ColocatedDrafter
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.feature_streams import FeatureStreams, SharedRows, _Stream, _Wanted
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
    case: Case,
    runner: CannedRunner,
    features: FeatureStore | None = None,
    lead: _Lead | None = None,
    drafter: ColocatedDrafter | None = None,
) -> Engine:
    target = case.config().target
    max_model_len = case.config().model.max_model_len
    assert max_model_len is not None
    return Engine(runner, target.num_pages, target.page_size, max_model_len, drafter, features, lead)


class _Colocated(ColocatedDrafter):
    """Runs on a part of its own."""

    def __init__(self, method: CannedDrafts, clock: Clock) -> None:
        super().__init__(method, 2**40)
        self._clock = clock

    def extend(self, *arguments: Any) -> None:
        self._clock.to("drafter")
        super().extend(*arguments)
        self._clock.to("target commit")

    def draft(self, *arguments: Any) -> BlockColumns:
        self._clock.to("drafter")
        blocks = super().draft(*arguments)
        self._clock.to("target commit")
        return blocks


class Target:
    """Engine and codec of rank 0."""

    def __init__(self, case: Case, clock: Clock, texts: Texts, channel: StepChannel | None = None) -> None:
        config = case.config()
        self._clock = clock
        self._limits = StepLimits(
            config.target.max_batch_tokens, config.model.max_model_len or 0, texts.tokenizer.vocab_size
        )
        self._runner = CannedRunner(case, clock, texts)
        self._store = DecodedStore(case)
        lead = None if channel is None else _Lead(channel, clock)
        drafter = _Colocated(CannedDrafts(case, clock, texts), clock) if case.is_colocated else None
        self.engine = _engine(case, self._runner, None if case.is_colocated else self._store, lead, drafter)
        pages = self._store.shared
        shared = None if pages is None or case.sends_rows else SharedRows(pages.offer, self.engine.name_features)
        self.features = FeatureStreams(
            self.engine.read_features, self._store.rows_per_piece, "target", FINGERPRINT, shared
        )
        self.features.lead(1)

    def start(self) -> None:
        """Prompts are over: features have their width from here on."""
        self._runner.is_starting = False
        self._store.start(self.decoded_rows())

    def decoded_rows(self) -> np.ndarray:
        """Rows of the pages that sequences write to now, and of those that they get next."""
        table = self.engine._table
        slots = np.array(list(table.slot_of.values()))
        blank = np.flatnonzero(self.engine.allocator._is_blank)[: PAGES_AHEAD * len(slots)]
        pages = np.append(table.pages[slots, table.page_counts[slots] - 1], blank)
        return (pages[:, None] * PAGE + np.arange(PAGE)).ravel()

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
        self._clock.to("target counts")
        self.engine.settle()
        self._clock.to("target features")
        kept = output.features
        if kept is not None:
            self.engine.keep_features(kept)
            self.features.publish(1, output.step_id, kept.sequence_ids.tolist(), kept.starts + kept.num_rows)
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


class _Source(FeatureSource):
    """A drafter's stream of features without a socket, both ends of it. Stands for the drafter's one source as well."""

    def __init__(self, target: Target, arrivals: Arrivals, width: int) -> None:
        self._streams = target.features
        self._stream = _Stream(self._streams._sequences)
        self._streams._streams.add(self._stream)
        self._arrivals = arrivals
        self._width = width
        self._pages = None
        self._numbers = itertools.count(1)
        self._session_of, self._number_of = {}, {}

    def open(self, address: str, stream: int) -> _Source:
        return self

    def _send(self, request: target_pb2.FeaturesRequest) -> None:
        wanted = request.subscribe
        columns = (wanted.subscription_ids, wanted.sequence_ids, wanted.starts)
        for number, sequence_id, start in zip(*columns, strict=True):
            self._streams._subscribe(self._stream, number, _Wanted(wanted.epoch, wanted.step_id, sequence_id, start))

    async def close(self) -> None:
        self._streams._streams.discard(self._stream)

    def start(self, width: int, warm: np.ndarray) -> None:
        """Rows are named from here on where that is possible."""
        self._width = width
        if self._streams._shared is not None:
            self._pages = FeaturePages.open(self._streams._shared.offer, width)
            self._pages.rows[warm].max()
            self._stream.names_rows = True

    def give(self) -> Iterator[bytes]:
        """The target's end: what is there to send."""
        while (response := self._streams._next(self._stream)) is not None:
            yield response

    def receive(self, data: bytes) -> None:
        """The drafter's end."""
        self._take(data)


class Drafter:
    """A drafter's sessions, its codec, and its stream of features."""

    def __init__(self, case: Case, clock: Clock, texts: Texts, target: Target) -> None:
        self._clock = clock
        self._method = CannedDrafts(case, clock, texts)
        self._warm = target.decoded_rows
        self._width = case.width
        arrivals = Arrivals()
        self._source = _Source(target, arrivals, case.prompt_width)
        sessions, watchdog = DraftSessions(self._method, 2**40), Watchdog(1e6, "a draft")
        self._drafts = Drafts(sessions, arrivals, self._source, watchdog, lambda start, end: None)  # type: ignore[arg-type]
        self._drafts._compute = _AtOnce()  # type: ignore[assignment]
        self.close = self._drafts.close

    def start(self) -> None:
        """As the target's."""
        self._method.feature_width = self._width
        self._source.start(self._width, self._warm())

    def features(self) -> list[bytes]:
        """Messages of the target for this drafter."""
        self._clock.to("target features")
        messages = list(self._source.give())
        self._clock.to(None)
        return messages

    def take_features(self, data: bytes) -> None:
        self._clock.to("drafter features")
        self._source.receive(data)
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
        self._engine = _engine(case, CannedRunner(case, clock, texts))

    def follow(self) -> bool:
        """A step; False after the last one."""
        self._clock.to("rank")
        step = self._channel.receive()
        if LAST in step.close:
            return False
        self._engine.step(step)
        self._clock.to("rank counts")
        self._engine.settle()
        self._clock.to(None)
        return True


def dismiss(channel: StepChannel) -> None:
    """Rank 0: there is no further step."""
    channel.send(StepInput(close=np.array([LAST], dtype=np.uint64)))
