"""Ends a process whose work hangs: in a collective that waits for a dead peer, in a kernel, in a lock."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)
_CHECKS_A_TIMEOUT = 8
_MAX_PERIOD_S = 5.0


def _end_process() -> None:
    faulthandler.dump_traceback()  # where it hangs, on stderr
    os._exit(1)


class Watchdog:
    """Watches pieces of work, one at a time, from a thread of its own.

    Args:
        what: the work, for the log.
        on_timeout: what ends it; the process, unless told otherwise.
    """

    def __init__(self, timeout_s: float, what: str, on_timeout: Callable[[], None] = _end_process) -> None:
        self._timeout_s = timeout_s
        self._what = what
        self._on_timeout = on_timeout
        self._started: float | None = None
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """The work inside must be over in time."""
        self._started = time.monotonic()
        try:
            yield
        finally:
            self._started = None

    def _run(self) -> None:
        while True:
            time.sleep(min(_MAX_PERIOD_S, self._timeout_s / _CHECKS_A_TIMEOUT))
            started = self._started
            if started is not None and time.monotonic() - started > self._timeout_s:
                logger.critical("%s took longer than %.0f s", self._what, self._timeout_s)
                self._on_timeout()
                return
