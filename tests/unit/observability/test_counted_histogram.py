"""A histogram that takes many equal values at once reads as if each had come by itself."""

import hypothesis.strategies as st
from hypothesis import given
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from dflash_ray.observability.metrics import CountedHistogram

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
        page = generate_latest(registry).decode()
        pages.append([line for line in page.splitlines() if "_created" not in line])
    assert pages[0] == pages[1]
