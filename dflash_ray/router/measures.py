"""What a pipeline measures of its steps and drafts, and how the scheduler's totals become metrics."""

from __future__ import annotations

from collections.abc import Callable

from dflash_ray.observability.metrics import RouterMetrics
from dflash_ray.router.actions import RequestDrafts, RunStep
from dflash_ray.router.scheduler import Scheduler
from dflash_ray.router.speculation.controller import SpeculationController


class Measures:
    """Times between what was sent and what came back; times in seconds of one clock."""

    def __init__(self, metrics: RouterMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._step_tokens = metrics.step_tokens.labels(model)
        self._steps_sent: dict[int, float] = {}
        self._drafts_sent: dict[str, tuple[int, float]] = {}  # drafter -> its one request and when it left
        self._idle_since: float | None = None  # the target has had no step since then
        self._counted: dict[str, float] = {}

    def step_sent(self, action: RunStep, now: float) -> None:
        if action.step.verify_ids and self._idle_since is not None:
            self._metrics.step_gap.observe(now - self._idle_since)
        self._idle_since = None
        self._steps_sent[action.step.step_id] = now
        self._step_tokens.observe(action.num_rows)

    def step_done(self, step_id: int, now: float) -> None:
        self._metrics.step_round_trip.observe(now - self._steps_sent.pop(step_id, now))
        if not self._steps_sent:
            self._idle_since = now

    def target_lost(self) -> None:
        self._steps_sent.clear()
        self._idle_since = None

    def drafts_sent(self, action: RequestDrafts, now: float) -> None:
        self._drafts_sent[action.drafter_id] = (action.request.request_id, now)

    def drafts_done(self, drafter_id: str, request_id: int, now: float) -> None:
        sent_id, sent_at = self._drafts_sent.get(drafter_id, (None, now))
        if sent_id == request_id:
            del self._drafts_sent[drafter_id]
            self._metrics.draft_round_trip.observe(now - sent_at)

    def drafter_lost(self, drafter_id: str) -> None:
        self._drafts_sent.pop(drafter_id, None)

    def update(self, scheduler: Scheduler) -> None:
        """Brings counters up to date with the scheduler."""
        metrics, model = self._metrics, self._model
        self._count("preemptions", scheduler.num_preemptions, metrics.num_preemptions.labels(model).inc)
        self._count("drafted", scheduler.num_draft_tokens, metrics.num_draft_tokens.labels(model).inc)
        for source, total in scheduler.num_drafts_by_source.items():
            self._count(f"source {source}", total, metrics.drafts_by_source.labels(source).inc)
        drafted = sum(n for source, n in scheduler.num_drafts_by_source.items() if source != "plain")
        self._count("drafts", drafted, metrics.num_drafts.labels(model).inc)
        accepted = scheduler.num_accepted_by_position.tolist()
        self._count("accepted", sum(accepted), metrics.num_accepted_tokens.labels(model).inc)
        for position, total in enumerate(accepted):
            if total:
                child = metrics.num_accepted_per_position.labels(model, str(position))
                self._count(f"accepted {position}", total, child.inc)
        self._count("replays", scheduler.drafting.num_replays, metrics.num_replays.inc)
        for reason, total in scheduler.drafting.num_dropped.items():
            self._count(f"dropped {reason}", total, metrics.drafts_dropped.labels(reason).inc)

        self._update_speculation(scheduler.speculating.controller)

    def _update_speculation(self, controller: SpeculationController) -> None:
        metrics, counts, ledger = self._metrics, controller.counts, controller.ledger
        for reason, total in counts.steps.items():
            self._count(f"steps {reason}", total, metrics.speculation_steps.labels(reason).inc)
        for kind, tokens in (("expected", counts.expected_tokens), ("realised", counts.realised_tokens)):
            self._count(f"tokens {kind}", tokens, metrics.speculation_tokens.labels(kind).inc)
        for kind, seconds in (("saved", ledger.seconds_saved), ("lost", ledger.seconds_lost)):
            self._count(f"seconds {kind}", seconds, metrics.speculation_seconds.labels(kind).inc)
        metrics.speculation_loss.set(ledger.loss)
        metrics.speculation_calibration.set(controller.acceptance.calibration_error)

    def _count(self, key: str, total: float, inc: Callable[[float], None]) -> None:
        before = self._counted.get(key, 0)
        self._counted[key] = total
        inc(total - before)
