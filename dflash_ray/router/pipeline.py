"""The I/O around one target group: streams in and out of the scheduler, and tokens to those who wait for them.

Every event is put into the scheduler at once, and what it asks for is done at once; a timer wakes it at its next
deadline. Nothing here decides anything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.errors import RequestError
from dflash_ray.observability.metrics import RouterMetrics
from dflash_ray.pb import drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import (
    Action,
    CloseSequences,
    DropDrafter,
    DropTarget,
    Emit,
    Fail,
    RequestDrafts,
    RunStep,
)
from dflash_ray.router.attempts import FinalError
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.measures import Measures
from dflash_ray.router.scheduler import Scheduler
from dflash_ray.router.sequence import RouterSequence
from dflash_ray.router.slot_table import NEVER
from dflash_ray.router.streams import Stream, open_drafter, open_target
from dflash_ray.rpc.directory import Entry

logger = logging.getLogger(__name__)

_LEARN_AFTER_S = 0.001  # that what was sent is on its way by then


class Receiver(Protocol):
    """Whoever started requests.

    Attributes:
        number: its own, in this process.
    """

    number: int

    def emit(self, emit: Emit) -> None:
        """New tokens of its calls; after a finish reason nothing follows."""

    def fail(self, call_id: int, error: RequestError) -> None:
        """A call ends with an error."""


class Pipeline:
    """Requests, one target stream, and a stream to every drafter that fits."""

    def __init__(self, config: DflashRayConfig, router_id: str, metrics: RouterMetrics) -> None:
        self._config = config
        self._router_id = router_id
        self._measures = Measures(metrics, config.model.served_name)
        self._max_message_bytes = config.network.max_message_bytes
        self.scheduler = Scheduler(config)
        self.target_id: str | None = None
        self.model_fingerprint = ""  # of the group that it leads or led last
        self._target: Stream | None = None
        self._feature_fingerprint = ""
        self._drafters: dict[str, Stream] = {}
        self._receivers: WeakValueDictionary[int, Receiver] = WeakValueDictionary()
        self._is_pump_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = NEVER  # when the timer is over
        self._lesson: asyncio.TimerHandle | None = None
        self._streams: set[Stream] = set()  # all that were opened here and whose end was not seen to be clean
        self._closing: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None

    @property
    def load(self) -> int:
        """Requests here, running or waiting."""
        return self.scheduler.num_running + self.scheduler.num_waiting

    async def connect_target(self, entry: Entry, epoch: int) -> None:
        """Leads a target group. Raises ConnectionError."""
        stream, hello = await open_target(entry.address, self._router_id, epoch, self._max_message_bytes)
        if hello.model_fingerprint != self.model_fingerprint:
            self.hand_over("the target group came back with another model")
        self._target, self.target_id, self.model_fingerprint = stream, entry.id, hello.model_fingerprint
        if hello.feature_fingerprint != self._feature_fingerprint:
            for drafter_id in list(self._drafters):  # those that fit join again
                self._drop_drafter(drafter_id)
        self._feature_fingerprint = hello.feature_fingerprint
        limits = TargetLimits(
            epoch=epoch,
            max_model_len=hello.max_model_len,
            vocab_size=hello.vocab_size,
            page_size=hello.page_size,
            num_pages=hello.num_pages,
            max_batch_tokens=hello.max_batch_tokens,
            colocated_draft_tokens=hello.colocated_draft_tokens,
            feature_fingerprint=hello.feature_fingerprint,
            address=entry.address,
        )
        self._streams.add(stream)
        stream.start(self._on_target_message, lambda: self._on_target_end(stream))
        self.scheduler.target_ready(limits, time.monotonic())
        logger.info("leading target group", extra={"target_id": entry.id, "epoch": epoch})
        self._pump()

    def hand_over(self, reason: str) -> None:
        """Ends every request here, so that gateways send them, with their tokens, to another group."""
        self.scheduler.hand_over(reason)
        self._pump()

    def disconnect_target(self) -> None:
        """Leaves the group, as when its directory entry is gone or it does not answer."""
        stream = self._target
        if stream is not None:
            self._close(stream)
            self._on_target_end(stream)

    def _close(self, stream: Stream) -> None:
        """Ends a stream without waiting for it."""
        self._streams.discard(stream)
        task = asyncio.create_task(stream.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _on_target_message(self, message: target_pb2.TargetResponse) -> None:
        now = time.monotonic()
        self._measures.step_done(message.result.step_id, now)
        self.scheduler.step_done(message.result, now)
        self._pump()
        if self._lesson is None and self.scheduler.has_lesson:
            self._lesson = asyncio.get_running_loop().call_later(_LEARN_AFTER_S, self._learn)

    def _on_target_end(self, stream: Stream) -> None:
        if self._target is not stream:
            return
        logger.warning("target group lost", extra={"target_id": self.target_id})
        self._target, self.target_id = None, None
        self._measures.target_lost()
        self.scheduler.target_lost(time.monotonic())
        self._pump()
        self._streams.discard(stream)

    def knows_drafter(self, drafter_id: str) -> bool:
        return drafter_id in self._drafters

    async def connect_drafter(self, entry: Entry) -> None:
        """Adds a drafter whose features fit this target. Raises ConnectionError; a FinalError if they don't."""
        stream, hello = await open_drafter(entry.address, self._router_id, self._max_message_bytes)
        if hello.needs_features and hello.fingerprint != self._feature_fingerprint:
            await stream.close()
            raise FinalError(f"drafter {entry.id} is for other features ({hello.fingerprint})")
        self._drafters[entry.id] = stream
        self._streams.add(stream)
        stream.start(
            lambda message: self._on_drafts(entry.id, message.drafts), lambda: self._on_drafter_end(entry.id, stream)
        )
        self.scheduler.drafting.join(DrafterState(entry.id, hello.needs_features, hello.max_draft_tokens))
        self._pump()

    def _on_drafts(self, drafter_id: str, reply: drafter_pb2.DraftReply) -> None:
        now = time.monotonic()
        self._measures.drafts_done(drafter_id, reply.request_id, now)
        self.scheduler.drafts_done(drafter_id, reply, now)
        self._pump()

    def _on_drafter_end(self, drafter_id: str, stream: Stream) -> None:
        if self._drafters.get(drafter_id) is stream:
            self._forget_drafter(drafter_id)
            self._pump()
        self._streams.discard(stream)

    def _drop_drafter(self, drafter_id: str) -> None:
        self._close(self._drafters[drafter_id])
        self._forget_drafter(drafter_id)

    def _forget_drafter(self, drafter_id: str) -> None:
        logger.warning("drafter lost", extra={"drafter_id": drafter_id})
        del self._drafters[drafter_id]
        self._measures.drafter_lost(drafter_id)
        self.scheduler.drafter_lost(drafter_id)

    def start(self, request: router_pb2.GenerateTokensRequest, receiver: Receiver, call_id: int) -> RouterSequence:
        """Takes a request, whose tokens go to the receiver. Raises RequestError."""
        sequence = self.scheduler.arrive(request, time.monotonic(), receiver.number, call_id)
        self._receivers[receiver.number] = receiver
        self._pump_soon()
        return sequence

    def cancel(self, sequence: RouterSequence) -> None:
        """Frees a sequence that nobody listens to any more; one that has ended is passed over."""
        self.scheduler.cancel(sequence)
        self._pump_soon()

    def _pump_soon(self) -> None:
        """One pump for all requests that come and go in a turn of the event loop."""
        if not self._is_pump_due:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._wake)

    def check_health(self) -> None:
        """Raises what has left this pipeline in a state that nothing here puts right."""
        if self._failure is not None:
            raise self._failure
        for stream in self._streams:
            stream.check()

    def _wake(self) -> None:
        self._guarded(self._pump)

    def _learn(self) -> None:
        self._lesson = None
        self._guarded(self.scheduler.learn)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # nobody calls a timer's callback who could be told
            logger.exception("the scheduler failed; this router reports itself unhealthy")
            self._failure = error

    def _pump(self) -> None:
        """Does everything there is to do now."""
        self._is_pump_due = False
        now = time.monotonic()
        has_events = True
        while has_events:
            has_events, for_clients = False, []
            # Target and drafters wait for what is theirs; clients are told while those are at work.
            for action in self.scheduler.poll(now):
                if isinstance(action, Emit | Fail):
                    for_clients.append(action)
                else:
                    self._perform(action, now)
                    has_events |= isinstance(action, DropDrafter)  # what was its looks for another one
            for action in for_clients:
                self._tell(action)
        self._wake_by(self.scheduler.next_deadline(), now)

    def _wake_by(self, deadline: float | None, now: float) -> None:
        """Has the timer end by the deadline. Most are put off before they are due: a timer that is early goes on."""
        if deadline is None or deadline >= self._wakes_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, deadline - now) + 1e-4, self._look)
        self._wakes_at = deadline

    def _look(self) -> None:
        """The timer is over; the deadline that it was for may have been put off."""
        self._timer, self._wakes_at = None, NEVER
        now, deadline = time.monotonic(), self.scheduler.next_deadline()
        if deadline is not None and now >= deadline:
            self._wake()
        else:
            self._wake_by(deadline, now)

    def _perform(self, action: Action, now: float) -> None:
        match action:
            case RunStep(step):
                self._measures.step_sent(action, now)
                self._send(target_pb2.TargetRequest(step=step))
            case CloseSequences(ids):
                self._send(target_pb2.TargetRequest(close=target_pb2.CloseSequences(sequence_ids=ids)))
            case RequestDrafts(drafter_id, request):
                self._measures.drafts_sent(action, now)
                self._drafters[drafter_id].send(drafter_pb2.DrafterRequest(draft=request))
            case DropTarget():
                logger.error("a step was not answered in time; the target group is left")
                self.disconnect_target()
            case DropDrafter(drafter_id):
                logger.error("a drafter did not answer in time; it is left", extra={"drafter_id": drafter_id})
                self._drop_drafter(drafter_id)

    def _tell(self, action: Emit | Fail) -> None:
        if isinstance(action, Emit):
            for stream, part in action.by_stream():
                receiver = self._receivers.get(stream)
                if receiver is not None:
                    receiver.emit(part)
            return
        sequence, error = action.sequence, action.error
        if error.__cause__ is not None:
            logger.error("a sequence failed", exc_info=error.__cause__)
        receiver = self._receivers.get(sequence.stream)
        if receiver is not None:
            receiver.fail(sequence.call_id, error)

    def _send(self, request: target_pb2.TargetRequest) -> None:
        if self._target is not None:
            self._target.send(request)

    def update_metrics(self) -> None:
        """Brings counters up to date with the scheduler."""
        self._measures.update(self.scheduler)

    async def close(self) -> None:
        """Ends all streams."""
        for timer in (self._timer, self._lesson):
            if timer is not None:
                timer.cancel()
        for stream in (*self._drafters.values(), *([self._target] if self._target else [])):
            await stream.close()
