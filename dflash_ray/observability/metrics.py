"""Every metric of the application, by the process that owns it.

Names that start with `vllm:` mean what they mean in vLLM, so that its dashboards and benchmarks read them. The rest is
`dflash_ray_*`. Derived values, with S for `vllm:spec_decode_num`:

    mean acceptance length   1 + rate(S_accepted_tokens_total) / rate(S_drafts_total)
    draft acceptance rate    rate(S_accepted_tokens_total) / rate(S_draft_tokens_total)
    acceptance at slot k     rate(S_accepted_tokens_per_pos_total{position="k"}) / rate(S_drafts_total)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_LATENCY_BUCKETS_S = (
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
)
_STEP_BUCKETS_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.024, 0.032, 0.048, 0.064, 0.128, 0.256, 0.512, 1.0, 4.0)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)


class CountedHistogram(Collector):
    """A histogram that takes many equal values at once, for one thread; with one label or none."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], label: str | None = None) -> None:
        self._name, self._text, self._label = name, text, label
        self._bounds = [*buckets, float("inf")]
        self._counts: dict[str, Counts] = {}

    def labels(self, value: str = "") -> Counts:
        """The values under a value of the label."""
        return self._counts.setdefault(value, Counts(self._bounds))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As prometheus_client asks for it."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for value, counts in self._counts.items():
            names = map(floatToGoString, self._bounds)
            family.add_metric(
                [value] if self._label else [], list(zip(names, accumulate(counts.counts), strict=True)), counts.total
            )
        yield family


class Counts:
    """How many values lie below each bound and above the one before."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * len(bounds)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Takes `count` equal values."""
        self.counts[bisect_left(self._bounds, value)] += count
        self.total += value * count


class CountedTotal(Collector):
    """A counter with one label, for one thread: no lock for each of many small numbers."""

    def __init__(self, name: str, text: str, label: str) -> None:
        self._name, self._text, self._label = name, text, label
        self._totals: dict[str, Total] = {}

    def labels(self, value: str) -> Total:
        """The number under a value of the label."""
        return self._totals.setdefault(value, Total())

    def collect(self) -> Iterator[CounterMetricFamily]:
        """As prometheus_client asks for it."""
        family = CounterMetricFamily(self._name, self._text, labels=[self._label])
        for value, total in self._totals.items():
            family.add_metric([value], total.count)
        yield family


@dataclass(slots=True)
class Total:
    """How much there has been so far."""

    count: int = 0


class _ProcessMetrics:
    """A registry of its own, so that processes and tests never share counters."""

    def __init__(self) -> None:
        # Creation times double the series and confuse readers that match names by prefix.
        prometheus_client.disable_created_metrics()
        self.registry = CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)  # process_cpu_seconds_total, memory, open files

    def render(self) -> str:
        """Prometheus text exposition of this process."""
        return generate_latest(self.registry).decode()

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _counted(self, name: str, text: str, buckets: Sequence[float], label: str | None = None) -> CountedHistogram:
        histogram = CountedHistogram(name, text, buckets, label)
        self.registry.register(histogram)
        return histogram

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)


class GatewayMetrics(_ProcessMetrics):
    """Requests as clients see them; label model_name."""

    def __init__(self) -> None:
        super().__init__()
        model = ("model_name",)
        self.time_to_first_token = self._seconds(
            "vllm:time_to_first_token_seconds", "Arrival to first token", _LATENCY_BUCKETS_S, model
        )
        self.inter_token_latency = self._counted(
            "vllm:inter_token_latency_seconds",
            "Time between tokens, a chunk's time over its tokens",
            _STEP_BUCKETS_S,
            "model_name",
        )
        self.e2e_latency = self._seconds(
            "vllm:e2e_request_latency_seconds", "Arrival to last token", _LATENCY_BUCKETS_S, model
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens", model)
        self.generation_tokens = CountedTotal("vllm:generation_tokens", "Tokens generated", "model_name")
        self.registry.register(self.generation_tokens)
        self.request_prompt_tokens = Histogram(
            "vllm:request_prompt_tokens",
            "Prompt tokens a request",
            model,
            registry=self.registry,
            buckets=_TOKEN_BUCKETS,
        )
        self.request_generation_tokens = Histogram(
            "vllm:request_generation_tokens", "Tokens a request", model, registry=self.registry, buckets=_TOKEN_BUCKETS
        )
        self.request_success = self._counter(
            "vllm:request_success", "Requests finished", ("model_name", "finished_reason")
        )
        self.refused = self._counter("dflash_ray_gateway_refused_requests", "Requests refused", ("kind",))
        self.resumed = self._counter("dflash_ray_gateway_resumed_calls", "Router calls that went on elsewhere", model)


class RouterMetrics(_ProcessMetrics):
    """Scheduling and speculation; label model_name where vLLM has it."""

    def __init__(self) -> None:
        super().__init__()
        model = ("model_name",)
        self.num_running = self._gauge("vllm:num_requests_running", "Sequences prefilled or decoded", model)
        self.num_waiting = self._gauge("vllm:num_requests_waiting", "Requests waiting for admission", model)
        self.kv_cache_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1", model)
        self.num_preemptions = self._counter("vllm:num_preemptions", "Sequences preempted by recompute", model)
        self.num_drafts = self._counter("vllm:spec_decode_num_drafts", "Draft blocks verified", model)
        self.num_draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Draft tokens verified", model)
        self.num_accepted_tokens = self._counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted", model)
        self.num_accepted_per_position = self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted draft tokens by slot", ("model_name", "position")
        )
        self.drafts_by_source = self._counter(
            "dflash_ray_router_drafts", "Verify entries by where their draft came from", ("source",)
        )
        self.drafts_dropped = self._counter("dflash_ray_router_drafts_dropped", "Drafts not used", ("reason",))
        self.num_replays = self._counter(
            "dflash_ray_router_feature_replays", "Sequences whose context features were fetched anew"
        )
        self.draft_round_trip = self._counted(
            "dflash_ray_router_draft_round_trip_seconds", "Draft request to draft blocks", _STEP_BUCKETS_S
        ).labels()
        self.step_round_trip = self._counted(
            "dflash_ray_router_step_round_trip_seconds", "Step to its result", _STEP_BUCKETS_S
        ).labels()
        self.step_gap = self._counted(
            "dflash_ray_router_step_gap_seconds",
            "A step's result to the next step: drafting and scheduling",
            _STEP_BUCKETS_S,
        ).labels()
        self.speculation_steps = self._counter(
            "dflash_ray_router_speculation_steps", "Steps that decoded, by why they drafted or did not", ("reason",)
        )
        self.speculation_tokens = self._counter(
            "dflash_ray_router_speculation_tokens",
            "Tokens of steps that drafted, as expected before and as they came",
            ("kind",),
        )
        self.speculation_seconds = self._counter(
            "dflash_ray_router_speculation_seconds",
            "Estimated time against plain decoding, of steps that were quicker and of those that were slower",
            ("kind",),
        )
        self.speculation_loss = self._gauge(
            "dflash_ray_router_speculation_loss",
            "Estimated loss against plain decoding over the last 200 steps, as a part of its time; negative is a gain",
        )
        self.speculation_calibration = self._gauge(
            "dflash_ray_router_speculation_calibration_error",
            "Mean distance between the chance that drafts were given and the share that was accepted",
        )
        self.step_tokens = self._counted(
            "vllm:iteration_tokens_total", "Rows of a target pass", _TOKEN_BUCKETS, "model_name"
        )


class TargetMetrics(_ProcessMetrics):
    """Phases of a target pass on rank 0, and its cache."""

    def __init__(self, model_name: str) -> None:
        super().__init__()
        self.phase = self._seconds(
            "dflash_ray_target_phase_seconds", "Time of a step's phase", _STEP_BUCKETS_S, ("phase",)
        )
        self.live_sequences = self._gauge("dflash_ray_target_live_sequences", "Sequences open")
        self.free_pages = self._gauge("dflash_ray_target_free_pages", "KV pages free")
        self.cached_pages = self._gauge("dflash_ray_target_cached_pages", "Free KV pages whose rows can be found again")
        model = ("model_name",)
        queries = self._counter("vllm:prefix_cache_queries", "Tokens that sequences were opened with", model)
        hits = self._counter("vllm:prefix_cache_hits", "Tokens among them whose rows were found computed", model)
        self.prefix_queries, self.prefix_hits = queries.labels(model_name), hits.labels(model_name)
        self.entries = self._counter("dflash_ray_target_entries", "Step entries by status", ("status",))


class DrafterMetrics(_ProcessMetrics):
    """Draft passes of one replica."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = self._seconds(
            "dflash_ray_drafter_phase_seconds", "Time of a draft request's phase", _STEP_BUCKETS_S, ("phase",)
        )
        self.live_sessions = self._gauge("dflash_ray_drafter_live_sessions", "Sessions open")
        self.context_rows = self._gauge("dflash_ray_drafter_context_rows", "Context rows held")
        self.busy_fraction = self._gauge("dflash_ray_drafter_busy_fraction", "Share of time spent drafting, 0 to 1")
        self.missing = self._counter("dflash_ray_drafter_missing_contexts", "Sequences without the context they need")
        self.refused = self._counter("dflash_ray_drafter_refused_contexts", "Sequences that found no room")
