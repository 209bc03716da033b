"""One application for the fast end-to-end tests."""

from collections.abc import Iterator

import pytest

from tests.applications import Application, application
from tests.reference import Reference


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="package")
def smollm2_app() -> Iterator[Application]:
    """SmolLM2 at TP 1 with two remote DFlash drafters: what `make serve` runs, and a drafter more."""
    with application("drafter.num_replicas=2") as app:
        yield app
