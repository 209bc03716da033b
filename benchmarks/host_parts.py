"""The processes around a model that costs nothing, each as one object that takes and gives the bytes of its wires.

Every part is the production one, driven without sockets: the router's pipeline and scheduler, the target's engine and
codec, the ranks' step channel, and the gateway's text and answers. Texts, drafts and verdicts are canned: every pass
keeps two of seven drafts and adds a token.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.errors import RequestError
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.arrivals import Arrival, Arrivals
from dflash_ray.drafter.drafts import Drafts
from dflash_ray.drafter.sessions import DraftSessions
from dflash_ray.gateway.choice import Choice
from dflash_ray.gateway.generation import _Progress
from dflash_ray.gateway.openai_responses import ResponseWriter
from dflash_ray.gateway.openai_types import ChatCompletionRequest
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.token_chunks import unpack
from dflash_ray.kernels.columns import IntColumn
from dflash_ray.models.block_drafter import DraftProposal
from dflash_ray.models.context_features import rows_of
from dflash_ray.models.dflash2 import Draw
from dflash_ray.observability.metrics import GatewayMetrics, RouterMetrics
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router import ngram_drafts
from dflash_ray.router.actions import Emit
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.outbox import Outbox
from dflash_ray.router.pipeline import Pipeline
from dflash_ray.sampling.columns import PlanColumns
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.verify import Verdict
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.codec import decode_step, encode_result
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.feature_streams import FeatureStreams, _Stream, _Wanted
from dflash_ray.target_group.model import StepHidden
from dflash_ray.target_group.step import StepFeatures, StepInput
from dflash_ray.target_group.step_channel import StepChannel
from dflash_ray.target_group.step_check import StepLimits, check_step
from dflash_ray.text.tokenizer import ChatTokenizer

FINGERPRINT = "canned"
DRAFTS = 7
KEPT_DRAFTS = 2
WORDS = 1000  # distinct tokens of all texts
CHUNK = 65_536  # rows of a prefill pass
SEQUENCES_A_DRAFTER = 128
PAGE = 16
LAST = 2**64 - 1  # a sequence whose closing ends the other ranks
STORE_ROWS = 4096  # of the feature store that all slots share: its writes count, not its size


@dataclass(frozen=True, slots=True)
class Case:
    """What runs: sequences of `context` tokens, each with DRAFTS drafts a step; features of `width` values.

    Attributes:
        prompt_width: of the prompts' features; narrow ones make the start, which is not counted, short.
        room: tokens that a text may grow by.
    """

    sequences: int
    context: int
    penalties: bool = False
    tp: int = 1
    width: int = 4096
    dtype: str = "bfloat16"
    prompt_width: int = 1
    room: int = 2048

    @property
    def name(self) -> str:
        context = f"{self.context // 1024}k" if self.context >= 1024 else str(self.context)
        parts = [f"{self.sequences} x {DRAFTS + 1}", context]
        return ", ".join([*parts, *(["penalties"] if self.penalties else []), *([f"TP {self.tp}"] * (self.tp > 1))])

    def config(self) -> DflashRayConfig:
        """Nothing waits for a clock, and one pass takes what there is."""
        tokens = self.context + self.room
        return DflashRayConfig.model_validate(
            {
                "model": {"max_model_len": tokens},
                "target": {
                    "kv_cache_tokens": self.sequences * tokens,
                    "page_size": PAGE,
                    "max_batch_tokens": max(CHUNK, self.sequences * (DRAFTS + 1)),
                    "tp_size": self.tp,
                    "step_timeout_s": 1e6,
                },
                "drafter": {"num_replicas": self.num_drafters, "step_timeout_s": 1e6},
                "router": {
                    "max_running": self.sequences,
                    "max_waiting": self.sequences,
                    "draft_tokens": DRAFTS,
                    "draft_timeout_ms": 1e9,
                    "prefill_chunk_tokens": CHUNK,
                },
                "network": {"max_message_bytes": 2**31 - 1},
            }
        )

    @property
    def num_drafters(self) -> int:
        """As many as keep one request to each below its limit of features."""
        return -(-self.sequences // SEQUENCES_A_DRAFTER)


class Clock:
    """CPU time of this thread, charged to the part that runs; nothing is charged before the first part."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        self._part: str | None = None
        self._since = 0

    def to(self, part: str | None) -> None:
        """From here on `part` runs, or what is not counted."""
        now = time.thread_time_ns()
        if self._part is not None:
            self.ns[self._part] += now - self._since
        self._part, self._since = part, time.thread_time_ns()


@dataclass(slots=True)
class Texts:
    """What every sequence says: its tokens by position, the same for target, drafter and prompt."""

    case: Case
    tokenizer: ChatTokenizer
    tokens: np.ndarray[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        words = [token for token in range(self.tokenizer.vocab_size) if self._is_word(token)][:WORDS]
        generator = np.random.default_rng(0)
        shape = self.case.sequences, self.case.context + self.case.room
        drawn = generator.integers(0, WORDS, shape)
        # The first ones differ, so that every prompt of 1,000 tokens has all words in its history.
        every_word = generator.permuted(np.tile(np.arange(WORDS), (shape[0], 1)), axis=1)
        drawn[:, :WORDS] = every_word[:, : shape[1]]
        self.tokens = np.array(words)[drawn]

    def _is_word(self, token: int) -> bool:
        text = self.tokenizer.decode([token])
        return len(text) > 3 and text.strip().isalpha() and text.isascii()

    def request(self, index: int) -> GenerationRequest:
        """A sequence's request; its seed is its number, by which the canned parts know it."""
        sampling = common_pb2.SamplingParams(temperature=0.8, top_p=0.95, seed=index, repetition_penalty=1.0)
        if self.case.penalties:
            sampling.repetition_penalty, sampling.presence_penalty = 1.1, 0.1
        return GenerationRequest(
            request_id=f"{index:032}",
            prompt_ids=self.tokens[index, : self.case.context].tolist(),
            sampling=sampling,
            stopping=common_pb2.StoppingParams(
                max_new_tokens=self.case.room - 2 * (DRAFTS + 1), stop_token_ids=self.tokenizer.eos_ids
            ),
            speculation=router_pb2.Speculation(),
            eos_ids=self.tokenizer.eos_ids,
        )


def indexed_at_once() -> AbstractContextManager[object]:
    """While it lasts a poll indexes all texts for n-grams, as they are once a server has run for a while."""
    return patch.object(ngram_drafts, "_INDEXED_AT_ONCE", 2**31)


class _Outbox:
    """Stands for a stream or for a request's queue: keeps what it is given."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def send(self, item: Any) -> None:
        self.items.append(item)

    put_nowait = send

    def take(self) -> list[Any]:
        items, self.items = self.items, []
        return items


class Router:
    """Scheduler, pipeline and protobuf of one target group's router."""

    def __init__(self, case: Case, clock: Clock, vocab_size: int) -> None:
        config = case.config()
        self._clock = clock
        self._target, self._gateway = _Outbox(), Outbox()
        self._receiver = _GatewayStream(self._gateway)
        self._pipeline = Pipeline(config, "router", RouterMetrics())
        self._pipeline._target = self._target
        self._drafters = {f"drafter{i}": _Outbox() for i in range(case.num_drafters)}
        self._pipeline._drafters.update(self._drafters)
        target = config.target
        limits = TargetLimits(
            1,
            config.model.max_model_len,
            vocab_size,
            target.page_size,
            target.num_pages,
            target.max_batch_tokens,
            feature_fingerprint="canned",
        )
        self._pipeline.scheduler.target_ready(limits, time.monotonic())
        for name in self._drafters:
            self._pipeline.scheduler.drafting.join(DrafterState(name, True, DRAFTS))
        self.drafter_names = list(self._drafters)
        self.indexes: dict[int, int] = {}  # sequence id -> number of the request

    def take_requests(self, messages: list[bytes]) -> None:
        for index, message in enumerate(messages):
            request = router_pb2.GenerateTokensRequest.FromString(message)
            self._pipeline.start(request, self._receiver, index)
        self._pipeline._pump()

    def take_from_target(self, data: bytes) -> None:
        self._clock.to("router codec")
        message = target_pb2.TargetResponse.FromString(data)
        self._clock.to("router scheduling")
        self._pipeline._on_target_message(message)
        self._clock.to(None)

    def take_from_drafter(self, name: str, data: bytes) -> None:
        self._clock.to("router codec")
        message = drafter_pb2.DrafterResponse.FromString(data)
        self._clock.to("router scheduling")
        self._pipeline._on_drafts(name, message.drafts)
        self._clock.to(None)

    def to_target(self) -> list[bytes]:
        self._clock.to("router codec")
        messages = [message.SerializeToString() for message in self._target.take()]
        self._clock.to(None)
        return messages

    def to_drafters(self) -> list[tuple[str, bytes]]:
        self._clock.to("router codec")
        messages = [
            (name, message.SerializeToString()) for name, out in self._drafters.items() for message in out.take()
        ]
        self._clock.to(None)
        return messages

    def to_gateway(self) -> list[bytes]:
        self._clock.to("router chunks")
        messages = []
        while (message := self._gateway.pop()) is not None:
            messages.append(message.SerializeToString())
        self._clock.to(None)
        return messages


class _GatewayStream:
    """The requests' stream, of which each is a call under its own number."""

    number = 1

    def __init__(self, outbox: Outbox) -> None:
        self.emit: Callable[[Emit], None] = outbox.add

    def fail(self, call_id: int, error: RequestError) -> None:
        raise error


class _RingStore(FeatureStore):
    """Writes and reads what it is told to, in few rows that all slots share; rows of prompts are not kept."""

    def __init__(self, case: Case) -> None:
        super().__init__(STORE_ROWS, case.width, getattr(torch, case.dtype))
        self._narrow = torch.zeros(1, case.prompt_width, dtype=self._rows.dtype)
        self.is_starting = case.prompt_width != case.width

    def put(self, slots: NDArray[np.int64], features: StepFeatures) -> None:
        if features.rows.shape[1] == self._rows.shape[1]:
            super().put(slots % STORE_ROWS, features)

    def get(self, slots: NDArray[np.int64]) -> torch.Tensor:
        if self.is_starting:
            return self._narrow.expand(len(slots), -1)
        return super().get(slots % STORE_ROWS)


class CannedRunner:
    """A rank without a model: the verdict is canned. `clock` goes on with what the engine does after each call."""

    device = torch.device("cpu")

    def __init__(self, case: Case, clock: Clock, texts: Texts) -> None:
        self._clock = clock
        self._texts = texts.tokens
        self._prompt_width = case.prompt_width
        self.is_starting = case.prompt_width != case.width
        self._features = torch.zeros(case.sequences * (DRAFTS + 1), case.width, dtype=getattr(torch, case.dtype))

    def forward(self, batch: StepBatch) -> StepHidden:
        self._clock.to(None)
        num_rows = len(batch.feature_rows)
        if num_rows > len(self._features) or self.is_starting:
            features = self._features[:1, : self._prompt_width].expand(num_rows, -1)
        else:
            features = self._features[:num_rows]
        self._clock.to("target columns")
        return StepHidden(torch.empty(0), features)

    def verify(self, hidden: StepHidden, columns: PlanColumns) -> Verdict:
        self._clock.to(None)
        ints = columns.tensors.ints.numpy()
        seeds, starts = ints[:, IntColumn.SEED], ints[:, IntColumn.ROOT_POSITION] + 1
        num_tokens = np.minimum(KEPT_DRAFTS, ints[:, IntColumn.NUM_ROWS] - 1) + 1
        depth = np.arange(columns.depth)
        last = self._texts.shape[1] - 1
        verdict = Verdict(
            tokens=self._texts[seeds[:, None], np.minimum(starts[:, None] + depth, last)].astype(np.int64),
            accepted_rows=np.where(depth < num_tokens[:, None] - 1, depth + 1, -1),
            num_tokens=num_tokens,
            num_accepted=num_tokens - 1,
            finishes=np.zeros_like(num_tokens),
            kv_lens=starts - 1 + num_tokens,
            is_flagged=np.zeros(len(ints), dtype=np.bool_),
        )
        self._clock.to("target commit")
        return verdict

    def score(self, hidden: StepHidden, batch: StepBatch) -> Logprobs:
        return Logprobs()


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
        self._store = _RingStore(case)
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
            ends = (kept.starts + kept.num_rows).tolist()
            self.features.publish(output.step_id, kept.sequence_ids.tolist(), ends)
        self._clock.to("target codec")
        result = target_pb2.TargetResponse(result=encode_result(output)).SerializeToString()
        self._clock.to(None)
        return result


class CannedDrafts:
    """A draft method whose sessions are as long as they should be, and whose drafts are the texts."""

    name, fingerprint, max_draft_tokens = "canned", FINGERPRINT, DRAFTS

    def __init__(self, case: Case, clock: Clock, texts: Texts) -> None:
        self.feature_width = case.prompt_width
        self._clock = clock
        self._texts = texts.tokens
        self._lens: dict[int, int] = {}

    def open(self, session: int) -> None:
        self._lens[session] = 0

    def close(self, session: int) -> None:
        del self._lens[session]

    def extend(self, session: int, start: int, features: torch.Tensor | None, token_ids: Sequence[int]) -> None:
        self._lens[session] = start + (len(token_ids) if features is None else len(features))

    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: Sequence[Draw],
    ) -> list[DraftProposal]:
        self._clock.to(None)
        proposals = []
        for session, count, draw in zip(sessions, num_draft_tokens, draws, strict=True):
            start = self._lens[session] + 1
            drafts = self._texts[draw.seed, start : start + count]
            proposals.append(DraftProposal(torch.from_numpy(drafts)[:, None], torch.zeros(count, 1)))
        self._clock.to("drafter")
        return proposals


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


class Gateway:
    """Requests out, tokens in, server-sent events out."""

    def __init__(self, case: Case, clock: Clock, texts: Texts) -> None:
        self._clock = clock
        self._texts = texts
        self._requests = [texts.request(index) for index in range(case.sequences)]
        self._choices = [Choice(request, 0, texts.tokenizer) for request in self._requests]
        body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "."}], "stream": True})
        self._writers = [
            ResponseWriter("chat", request.request_id, "model", texts.tokenizer, body, [request])
            for request in self._requests
        ]
        self._progress = [_Progress(GatewayMetrics(), "model") for _ in self._requests]

    @cached_property
    def requests(self) -> list[bytes]:
        """The messages that open the requests at the router."""
        return [
            router_pb2.GenerateTokensRequest(
                token_ids=request.prompt_ids,
                prompt_len=len(request.prompt_ids),
                sampling=request.sampling,
                stopping=request.stopping,
                speculation=request.speculation,
                request_id=request.request_id,
            ).SerializeToString()
            for request in self._requests
        ]

    def take(self, messages: list[bytes]) -> tuple[int, int]:
        """Requests that got tokens, and the bytes that clients get."""
        self._clock.to("gateway")
        count = size = 0
        for data in messages:
            for index, chunk in unpack(router_pb2.RouterResponse.FromString(data).progress):
                if isinstance(chunk, RequestError):
                    raise chunk
                delta = self._choices[index].take(chunk)
                self._progress[index].observe(delta)
                count += 1
                size += len(self._writers[index].events(delta).encode())
        self._clock.to(None)
        return count, size


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
