"""The production scheduler under a virtual clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dflash_ray.config import DflashRayConfig, parse_config
from dflash_ray.pb import drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import CloseSequences, DropDrafter, DropTarget, Emit, Fail, RequestDrafts, RunStep
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.scheduler import Scheduler
from dflash_ray.simulator.machine import VirtualDrafter, VirtualTarget, message_of
from dflash_ray.simulator.profile import Profile
from dflash_ray.simulator.workload import Request, Workload, requests_of

POLICIES = {
    "adaptive": router_pb2.SPECULATION_POLICY_ADAPTIVE,
    "fixed": router_pb2.SPECULATION_POLICY_FIXED,
    "off": router_pb2.SPECULATION_POLICY_OFF,
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """One target group and what drafts for it.

    Attributes:
        num_drafters: remote replicas; 0: the drafter is colocated.
        link: seconds that a message takes between two processes.
        noise: spread of the logarithm of every pass's time.
    """

    profile: Profile
    policy: str = "adaptive"
    num_drafters: int = 1
    draft_tokens: int = 5
    cohorts: int = 1
    link: float = 0.0
    noise: float = 0.0

    def config(self) -> DflashRayConfig:
        """As the router would be configured."""
        profile = self.profile
        router = {
            "policy": self.policy,
            "draft_tokens": self.draft_tokens,
            "cohorts": self.cohorts,
            "max_running": max(1, min(256, profile.max_batch_tokens // (1 + self.draft_tokens))),
            "max_waiting": 1_000_000,
            "prefill_chunk_tokens": min(256, profile.max_batch_tokens),
        }
        return parse_config(
            {
                "router": router,
                "model": {"max_model_len": profile.max_model_len},
                "drafter": {"placement_mode": "remote" if self.num_drafters else "colocated"},
                "target": {"max_batch_tokens": profile.max_batch_tokens, "kv_cache_tokens": profile.kv_cache_tokens},
                "network": {"max_message_bytes": 1 << 30},
            },
            "simulation",
        )


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
    """Runs a workload to its end."""

    def __init__(self, deployment: Deployment, workload: Workload) -> None:
        self._deployment = deployment
        self._workload = workload
        self._random = np.random.default_rng(workload.seed + 1)
        self._waiting = list(reversed(requests_of(workload)))
        self._by_id: dict[int, Request] = {}
        profile = deployment.profile
        self._target = VirtualTarget(
            profile, self._by_id, 0 if deployment.num_drafters else profile.draft_len, slowdown=self._slowdown
        )
        self._drafters = {f"drafter{i}": VirtualDrafter(profile, self._by_id) for i in range(deployment.num_drafters)}
        self._drafting = 0
        self._now = 0.0
        self._target_free_at = 0.0
        self._drafters_free_at = dict.fromkeys(self._drafters, 0.0)
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

    def _slowdown(self) -> float:
        profile = self._deployment.profile
        return profile.contention if profile.shares_cores and self._drafting else 1.0

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
                    self._take(action)
                case Fail(error=error):
                    raise RuntimeError(f"a simulated request failed: {error.message}")
                case DropTarget() | DropDrafter():
                    raise RuntimeError("a simulated process was given up")
        self.scheduler.learn()
        deadline = self.scheduler.next_deadline()
        if deadline is not None and (self._calls or self._events) and deadline > self._now:
            self._at(deadline + 1e-6, lambda: None)

    def _noisy(self, seconds: float) -> float:
        noise = self._deployment.noise
        return seconds * float(np.exp(self._random.normal(0, noise))) if noise else seconds

    def _run(self, step: target_pb2.Step) -> None:
        link, host = self._deployment.link, self._deployment.profile.host
        result, seconds = self._target.run(step)
        began = max(self._now + link + host, self._target_free_at)
        self._target_free_at = began + self._noisy(seconds)
        accepted = sum(result.num_accepted_drafts)
        self._passes += len(step.verify_ids)
        self._accepted += accepted
        num_tokens = sum(result.num_tokens[len(step.prefill_ids) :])
        self._at(self._target_free_at + link, lambda: self._finish(result, num_tokens, len(step.verify_ids)))

    def _finish(self, result: target_pb2.StepResult, num_tokens: int, num_sequences: int) -> None:
        if num_sequences:
            self._steps.append((self._now - self._step_began, num_tokens, num_sequences))
        self._step_began = self._now
        self.scheduler.step_done(result, self._now)

    def _draft(self, drafter_id: str, request: drafter_pb2.DraftRequest) -> None:
        link = self._deployment.link
        reply, seconds = self._drafters[drafter_id].answer(request)
        began = max(self._now + link, self._drafters_free_at[drafter_id])
        ends = began + self._noisy(seconds)
        self._drafters_free_at[drafter_id] = ends
        self._drafting += 1
        self._at(ends + link, lambda: self._drafted(drafter_id, reply))

    def _drafted(self, drafter_id: str, reply: drafter_pb2.DraftReply) -> None:
        self._drafting -= 1
        self.scheduler.drafts_done(drafter_id, reply, self._now)

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
        drafting = sum(drafter.busy_seconds for drafter in self._drafters.values())
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
            target_busy=(self._target.busy_seconds + self._target.draft_busy_seconds) / seconds,
            drafter_busy=drafting / seconds,
            reasons={str(reason): count for reason, count in controller.counts.steps.items()},
            calibration_error=controller.acceptance.calibration_error,
        )


def simulate(deployment: Deployment, workload: Workload) -> Outcome:
    """Runs a workload on one target group."""
    return Simulation(deployment, workload).run()
