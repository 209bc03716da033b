"""The processes around a model that costs nothing, each as one object that takes and gives the bytes of its wires.

Every part is the production one, driven without sockets: the router's pipeline and scheduler, the target's engine and
codec, the ranks' step channel, and the gateway's text and answers. Texts, drafts and verdicts are canned: every pass
keeps two of seven drafts and adds a token.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dflash_ray.config import DflashRayConfig
from dflash_ray.drafter.sessions import DraftSessions
from dflash_ray.gateway.choice import Choice
from dflash_ray.gateway.generation import Generator
from dflash_ray.gateway.openai_responses import ResponseWriter
from dflash_ray.gateway.openai_types import ChatCompletionRequest
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.kernels.columns import CommitColumn, OutcomeColumn
from dflash_ray.models.block_drafter import DraftProposal
from dflash_ray.models.dflash2 import Draw
from dflash_ray.observability.metrics import GatewayMetrics, RouterMetrics
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router import scheduler
from dflash_ray.router.drafting import DrafterState
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.pipeline import Pipeline, to_chunk
from dflash_ray.sampling.columns import to_columns
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.plan import SequencePlan, pack_plan, unpack_plan
from dflash_ray.sampling.verify import SequenceOutcome, _to_outcome
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import StepHidden
from dflash_ray.target_group.step_check import check_step
from dflash_ray.target_group.tensor_parallel import StepChannel
from dflash_ray.text.tokenizer import ChatTokenizer

FINGERPRINT = "canned"
DRAFTS = 7
KEPT_DRAFTS = 2
WORDS = 1000  # distinct tokens of all texts
CHUNK = 65_536  # rows of a prefill pass
SEQUENCES_A_DRAFTER = 128
PAGE = 16
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
    return patch.object(scheduler, "_INDEXED_AT_ONCE", 2**31)


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
        self._target, self._gateways = _Outbox(), _Outbox()
        self._pipeline = Pipeline(config, "router", RouterMetrics())
        self._pipeline._target = self._target
        self._drafters = {f"drafter{i}": _Outbox() for i in range(case.num_drafters)}
        self._pipeline._drafters.update(self._drafters)
        target = config.target
        limits = TargetLimits(
            1, config.model.max_model_len, vocab_size, target.page_size, target.num_pages, target.max_batch_tokens
        )
        self._pipeline.scheduler.target_ready(limits, time.monotonic())
        for name in self._drafters:
            self._pipeline.scheduler.drafting.join(DrafterState(name, True, DRAFTS))
        self.indexes: dict[int, int] = {}  # sequence id -> number of the request

    def take_requests(self, messages: list[bytes]) -> None:
        for index, message in enumerate(messages):
            request = router_pb2.GenerateTokensRequest.FromString(message)
            sequence = self._pipeline.scheduler.arrive(request, time.monotonic())
            self._pipeline._queues[sequence.sequence_id] = self._gateways
            self.indexes[sequence.sequence_id] = index
        self._pipeline._pump()

    def take_from_target(self, data: bytes) -> None:
        is_features = data[:1] == b"\x22"  # of the field `features`
        self._clock.to("router features" if is_features else "router codec")
        message = target_pb2.TargetResponse.FromString(data)
        self._clock.to("router features" if is_features else "router scheduling")
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
        self._clock.to("router features")
        messages = [
            (name, message.SerializeToString()) for name, out in self._drafters.items() for message in out.take()
        ]
        self._clock.to(None)
        return messages

    def to_gateway(self) -> list[tuple[int, bytes]]:
        """Messages with the numbers of the requests that they are for."""
        self._clock.to("router chunks")
        now = time.monotonic()
        emits = self._gateways.take()
        messages = [to_chunk(emit.sequence, emit, now).SerializeToString() for emit in emits]
        self._clock.to(None)
        return [
            (self.indexes[emit.sequence.sequence_id], message) for emit, message in zip(emits, messages, strict=True)
        ]


class _RingStore(FeatureStore):
    """Writes what the engine writes, into few rows that all slots share; rows of prompts are not kept."""

    def put(self, slots: list[int], features: torch.Tensor) -> None:
        if features.shape[1] == self._rows.shape[1]:
            super().put([slot % STORE_ROWS for slot in slots], features)


class CannedRunner:
    """The ranks together, without a model: the plan travels and becomes columns, the verdict is canned."""

    def __init__(self, case: Case, clock: Clock, texts: Texts, channel: StepChannel | None) -> None:
        self._clock = clock
        self._texts = texts.tokens
        self._channel = channel
        self._prompt_width = case.prompt_width
        self.is_starting = case.prompt_width != case.width
        self._features = torch.zeros(case.sequences * (DRAFTS + 1), case.width, dtype=getattr(torch, case.dtype))

    def forward(self, batch: StepBatch, plan: list[SequencePlan]) -> StepHidden:
        self._clock.to("target to ranks")
        if self._channel is not None:
            self._channel.send(batch.pack(), pack_plan(plan))
        self._clock.to(None)
        num_rows = len(batch.feature_rows)
        if num_rows > len(self._features) or self.is_starting:
            features = self._features[:1, : self._prompt_width].expand(num_rows, -1)
        else:
            features = self._features[:num_rows]
        return StepHidden(torch.empty(0), features)

    def verify(self, hidden: StepHidden, plan: list[SequencePlan]) -> list[SequenceOutcome]:
        self._clock.to("target columns")
        columns = to_columns(plan, torch.device("cpu"))
        self._clock.to(None)
        outcome, commits = self._verdict(plan, columns.depth)
        self._clock.to("target commit")
        return [
            _to_outcome(line, commit, columns.depth)
            for line, commit in zip(outcome.tolist(), commits.tolist(), strict=True)
        ]

    def score(self, hidden: StepHidden, batch: StepBatch) -> Logprobs:
        return Logprobs()

    def _verdict(self, plan: list[SequencePlan], depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        outcome = torch.full((len(plan), OutcomeColumn.TOKENS + 2 * depth), -1)
        commits = torch.zeros(len(plan), len(CommitColumn), dtype=torch.int64)
        for i, sequence in enumerate(plan):
            kept = min(KEPT_DRAFTS, len(sequence.tokens) - 1)
            start = sequence.position + 1
            tokens = self._texts[sequence.seed, start : start + kept + 1]
            outcome[i, OutcomeColumn.NUM_ACCEPTED], outcome[i, OutcomeColumn.IS_FLAGGED] = kept, 0
            outcome[i, OutcomeColumn.TOKENS : OutcomeColumn.TOKENS + kept + 1] = torch.from_numpy(tokens.copy())
            at = OutcomeColumn.TOKENS + depth
            outcome[i, at : at + kept] = torch.arange(1, kept + 1)
            commits[i, CommitColumn.NUM_TOKENS] = kept + 1
            commits[i, CommitColumn.NUM_ROWS] = kept + 1
            commits[i, CommitColumn.KV_LEN] = start + kept
        return outcome, commits


class Target:
    """Engine and codec of rank 0."""

    def __init__(self, case: Case, clock: Clock, texts: Texts, channel: StepChannel | None = None) -> None:
        target = case.config().target
        self._clock = clock
        self._max_batch_tokens = target.max_batch_tokens
        self._runner = CannedRunner(case, clock, texts, channel)
        self.engine = Engine(
            self._runner,
            target.num_pages,
            target.page_size,
            case.config().model.max_model_len,
            texts.tokenizer.vocab_size,
            features=_RingStore(STORE_ROWS, case.width, getattr(torch, case.dtype)),
        )

    def start(self) -> None:
        """Prompts are over: features have their width from here on."""
        self._runner.is_starting = False

    def take(self, data: bytes) -> list[bytes]:
        """The answers to a message: features, then the result."""
        self._clock.to("target codec")
        request = target_pb2.TargetRequest.FromString(data)
        check_step(request.step, self._max_batch_tokens)
        self._clock.to("target batch")
        output = self.engine.step(request.step)
        self._clock.to("target features")
        answers = [target_pb2.TargetResponse(features=piece).SerializeToString() for piece in output.features]
        self._clock.to("target codec")
        answers.append(target_pb2.TargetResponse(result=output.result).SerializeToString())
        self._clock.to(None)
        return answers


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
        self._lens[session] = start + len(token_ids)

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


class Drafter:
    """The drafters' sessions and codec."""

    def __init__(self, case: Case, clock: Clock, texts: Texts) -> None:
        self._clock = clock
        self._method = CannedDrafts(case, clock, texts)
        self._width = case.width
        self._sessions = DraftSessions(self._method, 2**40)

    def start(self) -> None:
        """As the target's."""
        self._method.feature_width = self._width

    def take(self, data: bytes) -> bytes:
        self._clock.to("drafter")
        request = drafter_pb2.DrafterRequest.FromString(data)
        answer = drafter_pb2.DrafterResponse(drafts=self._sessions.answer(0, request.draft)).SerializeToString()
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
        self._metrics = Generator(None, texts.tokenizer, GatewayMetrics(), "model", 1.0, 1.0)  # type: ignore[arg-type]

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

    def take(self, messages: list[tuple[int, bytes]]) -> int:
        """The bytes that clients get."""
        self._clock.to("gateway")
        size = 0
        for index, data in messages:
            chunk = router_pb2.TokenChunk.FromString(data)
            choice = self._choices[index]
            before = choice.num_tokens
            delta = choice.take(chunk)
            self._metrics._observe(len(delta.token_ids), before, 0.01, 0.01)
            for event in self._writers[index].chunks(delta):
                size += len(f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode())
        self._clock.to(None)
        return size


def follow(channel: StepChannel, clock: Clock) -> bool:
    """Another rank's part of a step; False after the last one."""
    flat_batch, flat_plan = channel.receive()
    if not len(flat_batch):
        return False
    clock.to("rank")
    StepBatch.unpack(flat_batch)
    plan = unpack_plan(flat_plan)
    if plan:
        to_columns(plan, torch.device("cpu"))
    clock.to(None)
    return True


def dismiss(channel: StepChannel) -> None:
    """Rank 0: there is no further step."""
    channel.send(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
