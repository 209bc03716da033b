"""Ranks that share a vocabulary, as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class ThreadShards:
    """One rank's end of a group of threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, values: list[Any]) -> None:
        self.size = size
        self._rank, self._barrier, self._values = rank, barrier, values

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        self._values[self._rank] = values
        self._barrier.wait()
        gathered = torch.stack(self._values)
        self._barrier.wait()
        return gathered


def run_sharded(size: int, work: Callable[[int, ThreadShards], Any]) -> list[Any]:
    """Results of work(rank, group) of every rank; an error of any rank is raised."""
    barrier, values = threading.Barrier(size, timeout=60), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, ThreadShards(rank, size, barrier, values))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
