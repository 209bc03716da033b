"""Metrics that are counted without a lock read as those of prometheus_client."""

import hypothesis.strategies as st
from hypothesis import given
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from dflash_ray.observability.metrics import CountedHistogram, CountedTotal

BUCKETS = (0.5, 1, 2.5)


OBSERVED = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([0, 0.5, 0.75, 1, 2, 4]), st.integers(0, 5)))


@given(observed=OBSERVED, has_label=st.booleans())
def test_its_exposition_is_that_of_a_histogram_that_observed_every_value(observed, has_label):
    pages = []
    for is_counted in (True, False):
        registry = CollectorRegistry()
        if is_counted:
            counted = CountedHistogram("seconds", "Time", BUCKETS, "model" if has_label else None)
            registry.register(counted)
            if not has_label:
                counted.labels()
        else:
            plain = Histogram("seconds", "Time", ["model"] * has_label, registry=registry, buckets=BUCKETS)
        for label, value, count in observed:
            if is_counted:
                counted.labels(*[label] * has_label).observe(value, count)
            else:
                child = plain.labels(label) if has_label else plain
                for _ in range(count):
                    child.observe(value)
        pages.append(page_of(registry))
    assert pages[0] == pages[1]


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 5))))
def test_the_exposition_of_a_total_is_that_of_a_counter(counted):
    registries = CollectorRegistry(), CollectorRegistry()
    total = CountedTotal("tokens", "Tokens", "model")
    registries[0].register(total)
    counter = Counter("tokens", "Tokens", ["model"], registry=registries[1])
    for label, count in counted:
        total.labels(label).count += count
        counter.labels(label).inc(count)
    assert page_of(registries[0]) == page_of(registries[1])


def page_of(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]
