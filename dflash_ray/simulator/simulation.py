"""The production scheduler under a virtual clock."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dflash_ray.pb import drafter_pb2, target_pb2
from dflash_ray.router.actions import CloseSequences, DropDrafter, DropTarget, Emit, Fail, RequestDrafts, RunStep
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.scheduler import Scheduler
from dflash_ray.simulator.cores import Cores
from dflash_ray.simulator.deployment import POLICIES, Deployment
from dflash_ray.simulator.machine import VirtualDrafter, VirtualTarget, message_of
from dflash_ray.simulator.workload import Request, Workload, requests_of


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was sent; seconds of its pass and of the colocated drafter behind it, by themselves."""

    step: target_pb2.Step
    result: target_pb2.StepResult
    seconds: float
    draft_seconds: float


@dataclass(slots=True)
class _Call:
    """A request under way."""

    request: Request
    arrived_at: float
    last_at: float = 0.0
    first_after: float = 0.0
    num_tokens: int = 0
    gaps: list[tuple[float, int]] = field(default_factory=list)  # seconds and tokens of every chunk after the first


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation came to.

    Attributes:
        token_rate: tokens a second, over all requests.
        plain_seconds: what plain passes take, in the same batches, for the tokens that came.
        first_token, last_token: seconds from arrival, of every request.
        token_gaps: seconds of a chunk over its tokens, once for each token.
        steps: (seconds, tokens, sequences) of every step that decoded.
        target_busy, drafter_busy: shares of the time; the latter of all drafters together, over one of them.
    """

    seconds: float
    num_tokens: int
    plain_seconds: float
    first_token: np.ndarray
    last_token: np.ndarray
    token_gaps: np.ndarray
    steps: np.ndarray
    acceptance_length: float
    target_busy: float
    drafter_busy: float
    reasons: dict[str, int]
    calibration_error: float

    @property
    def token_rate(self) -> float:
        return self.num_tokens / self.seconds


class Simulation:
    """Runs a workload to its end.

    Args:
        requests: in place of those that the workload draws.
    """

    def __init__(self, deployment: Deployment, workload: Workload, requests: Sequence[Request] | None = None) -> None:
        self._deployment = deployment
        self._workload = workload
        self._random = np.random.default_rng(workload.seed + 1)
        self._waiting = list(reversed(requests_of(workload) if requests is None else requests))
        self._by_id: dict[int, Request] = {}
        profile = deployment.profile
        self._target = VirtualTarget(profile, self._by_id, 0 if deployment.num_drafters else profile.draft_len)
        self._drafters = {f"drafter{i}": VirtualDrafter(profile, self._by_id) for i in range(deployment.num_drafters)}
        self._now = 0.0
        self._cores = Cores(profile.cores, lambda: self._now, self._at)
        self._queue: deque[_Flight] = deque()  # at the target
        self._wakes_at = np.inf  # for the scheduler's next deadline
        self._arrived_at = 0.0  # there, the last step that was sent
        self._in_pass = False
        self._deliveries: deque[Emit] = deque()
        self._in_delivery = False
        self._target_busy = self._drafters_busy = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._calls: dict[int, _Call] = {}
        self._done: list[_Call] = []
        self._passes = self._accepted = 0
        self._steps: list[tuple[float, int, int]] = []
        self._step_began = 0.0
        self.scheduler = Scheduler(deployment.config())

    def run(self) -> Outcome:
        """Until every request has its last token."""
        scheduler = self.scheduler
        scheduler.target_ready(self._target.limits, 0.0)
        for name in self._drafters:
            scheduler.drafting.join(DrafterState(name, True, self._deployment.profile.draft_len))
        if self._workload.clients is not None:
            for _ in range(min(self._workload.clients, len(self._waiting))):
                self._arrive(self._waiting.pop())
        else:
            for request in self._waiting:
                assert request.arrives_at is not None
                self._at(request.arrives_at, lambda request=request: self._arrive(request))  # type: ignore[misc]
            self._waiting.clear()
        self._pump()
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            event()
            self._pump()
        return self._outcome()

    def _at(self, time: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time, self._num_events, event))

    def _arrive(self, request: Request) -> None:
        sequence = self.scheduler.arrive(message_of(request, POLICIES[self._deployment.policy]), self._now)
        self._by_id[sequence.sequence_id] = request
        self._calls[sequence.sequence_id] = _Call(request, self._now)

    def _pump(self) -> None:
        for action in self.scheduler.poll(self._now):
            match action:
                case RunStep(step):
                    self._run(step)
                case RequestDrafts(drafter_id, request):
                    self._draft(drafter_id, request)
                case CloseSequences(ids):
                    self._target.close(ids)
                case Emit():
                    self._deliveries.append(action)
                    self._deliver()
                case Fail(error=error):
                    raise RuntimeError(f"a simulated request failed: {error.message}")
                case DropDrafter(drafter_id):
                    self.scheduler.drafter_lost(drafter_id)
                    self._at(self._now, lambda: None)  # what was its own looks for another one
                case DropTarget():
                    raise RuntimeError("the simulated target was given up")
        self.scheduler.learn()
        deadline = self.scheduler.next_deadline()
        if deadline is not None and (self._calls or self._events) and self._now < deadline < self._wakes_at:
            self._wakes_at = deadline
            self._at(deadline + 1e-6, self._wake)

    def _wake(self) -> None:
        self._wakes_at = np.inf

    def _noisy(self, seconds: float) -> float:
        noise = self._deployment.noise
        return seconds * float(np.exp(self._random.normal(0, noise))) if noise else seconds

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        """Once a message has come through."""
        if seconds:
            self._at(self._now + seconds, then)
        else:
            then()

    def _run(self, step: target_pb2.Step) -> None:
        """A step on its way to the target, which takes one after the other."""
        profile = self._deployment.profile
        result, seconds, draft_seconds = self._target.run(step)
        flight = _Flight(step, result, self._noisy(seconds), self._noisy(draft_seconds))
        self._passes += len(step.verify_ids)
        self._accepted += sum(result.num_accepted_drafts)
        way = self._deployment.link + profile.host(len(step.verify_ids))
        self._arrived_at = max(self._arrived_at, self._now + way)  # none overtakes the one before

        def arrive() -> None:
            self._queue.append(flight)
            self._begin_pass()

        self._after(self._arrived_at - self._now, arrive)

    def _begin_pass(self) -> None:
        if self._in_pass or not self._queue:
            return
        profile, flight, began = self._deployment.profile, self._queue.popleft(), self._now
        self._in_pass = True

        def passed() -> None:
            flight.result.timings.forward_ns = int((self._now - began) * 1e9)
            self._target_busy += self._now - began
            passed_at = self._now

            def drafted() -> None:
                flight.result.timings.draft_ns = int((self._now - passed_at) * 1e9)
                self._target_busy += self._now - passed_at
                self._in_pass = False
                self._after(self._deployment.link, lambda: self._finish(flight))
                self._begin_pass()

            if flight.draft_seconds:
                self._cores.run(flight.draft_seconds, profile.draft_cores, drafted)
            else:
                drafted()

        self._cores.run(flight.seconds, profile.pass_cores, passed)

    def _finish(self, flight: _Flight) -> None:
        if flight.step.verify_ids:
            num_tokens = sum(flight.result.num_tokens[len(flight.step.prefill_ids) :])
            self._steps.append((self._now - self._step_began, num_tokens, len(flight.step.verify_ids)))
        self._step_began = self._now
        self.scheduler.step_done(flight.result, self._now)

    def _draft(self, drafter_id: str, request: drafter_pb2.DraftRequest) -> None:
        """A request on its way to a drafter, which has one at a time, and back."""
        profile, link = self._deployment.profile, self._deployment.link
        reply, seconds = self._drafters[drafter_id].answer(request)
        seconds, way = self._noisy(seconds), profile.ask(len(request.sequence_ids)) / 2

        def begin() -> None:
            began = self._now

            def drafted() -> None:
                self._drafters_busy += self._now - began
                self._after(link, lambda: self._cores.run(way, 1.0, lambda: self._drafted(drafter_id, reply)))

            self._cores.run(seconds, profile.draft_cores, drafted)

        self._after(link, lambda: self._cores.run(way, 1.0, begin))

    def _drafted(self, drafter_id: str, reply: drafter_pb2.DraftReply) -> None:
        self.scheduler.drafts_done(drafter_id, reply, self._now)

    def _deliver(self) -> None:
        """Tokens on their way to clients, those of one step after those of the other."""
        if self._in_delivery or not self._deliveries:
            return
        self._in_delivery, emit = True, self._deliveries.popleft()

        def deliver() -> None:
            self._take(emit)
            self._in_delivery = False
            self._deliver()

        self._cores.run(self._deployment.profile.beside(len(emit.sequence_ids)), 1.0, deliver)

    def _take(self, emit: Emit) -> None:
        for sequence_id, tokens, reason in emit.entries():
            call = self._calls[sequence_id]
            if tokens:
                if call.num_tokens:
                    call.gaps.append((self._now - call.last_at, len(tokens)))
                else:
                    call.first_after = self._now - call.arrived_at
                call.num_tokens += len(tokens)
                call.last_at = self._now
            if reason:
                self._done.append(self._calls.pop(sequence_id))
                if self._waiting:
                    self._at(self._now, lambda request=self._waiting.pop(): self._arrive(request))  # type: ignore[misc]

    def _outcome(self) -> Outcome:
        gaps = [seconds / count for call in self._done for seconds, count in call.gaps for _ in range(count)]
        controller = self.scheduler.speculating.controller
        seconds = max(call.last_at for call in self._done)
        return Outcome(
            seconds=seconds,
            num_tokens=sum(call.num_tokens for call in self._done),
            plain_seconds=self._target.plain_seconds,
            last_token=np.array([call.last_at - call.arrived_at for call in self._done]),
            first_token=np.array([call.first_after for call in self._done]),
            token_gaps=np.array(gaps or [0.0]),
            steps=np.array(self._steps or np.zeros((0, 3))),
            acceptance_length=1 + self._accepted / max(1, self._passes),
            target_busy=self._target_busy / seconds,
            drafter_busy=self._drafters_busy / seconds,
            reasons={str(reason): count for reason, count in controller.counts.steps.items()},
            calibration_error=controller.acceptance.calibration_error,
        )


def simulate(deployment: Deployment, workload: Workload, requests: Sequence[Request] | None = None) -> Outcome:
    """Runs a workload on one target group."""
    return Simulation(deployment, workload, requests).run()
