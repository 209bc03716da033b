"""The host's loops in C and their numpy twins, one or the other for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from dflash_ray.core import host_code

both_kinds = pytest.mark.parametrize("are_compiled", [True, False], ids=["compiled", "numpy"])


@contextmanager
def loops(are_compiled: bool) -> Iterator[None]:
    """Within it the loops are those in C, or those in numpy."""
    if are_compiled:
        assert host_code.library() is not None, "the tests need a C compiler"
        yield
    else:
        with patch.object(host_code, "library", lambda: None):
            yield


class InNumpy:
    """Goes before a state machine, which then runs without the loops in C."""

    def __init__(self) -> None:
        self._loops = loops(are_compiled=False)
        self._loops.__enter__()
        super().__init__()

    def teardown(self) -> None:
        super().teardown()
        self._loops.__exit__(None, None, None)
