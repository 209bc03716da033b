"""The host's loops in C and their numpy twins, one or the other for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from dflash_ray.core import host_code


@contextmanager
def loops_in_numpy() -> Iterator[None]:
    """Within it there are no loops in C."""
    with patch.object(host_code, "library", lambda: None):
        yield


class InNumpy:
    """Goes before a state machine, which then runs without the loops in C."""

    def __init__(self) -> None:
        self._loops = loops_in_numpy()
        self._loops.__enter__()
        super().__init__()

    def teardown(self) -> None:
        super().teardown()
        self._loops.__exit__(None, None, None)
