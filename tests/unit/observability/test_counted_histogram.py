"""Metrics that are counted without a lock read as those of prometheus_client."""

import hypothesis.strategies as st
from hypothesis import given
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from dflash_ray.observability.metrics import CountedHistogram, CountedTotal

BUCKETS = (0.5, 1, 2.5)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([0, 0.5, 0.75, 1, 2, 4]), st.integers(0, 5))))
def test_its_exposition_is_that_of_a_histogram_that_observed_every_value(observed):
    pages = []
    for is_counted in (True, False):
        registry = CollectorRegistry()
        if is_counted:
            counted = CountedHistogram("seconds", "Time", BUCKETS, "model")
            registry.register(counted)
        else:
            plain = Histogram("seconds", "Time", ["model"], registry=registry, buckets=BUCKETS)
        for label, value, count in observed:
            if is_counted:
                counted.labels(label).observe(value, count)
            else:
                child = plain.labels(label)
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
