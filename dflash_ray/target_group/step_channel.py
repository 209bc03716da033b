"""How the rank that leads a group tells the others of each step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from dflash_ray.core.watchdog import Watchdog
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.step import StepInput
from dflash_ray.target_group.step_message import pack_step, unpack_step
from dflash_ray.target_group.tensor_parallel import IDLE_TIMEOUT

_MESSAGE_SIZE = 4096  # values sent at once: of 256 sequences with 8 rows each; what is longer takes a second message


class StepChannel:
    """Broadcasts from rank 0 over a connection of their own between the ranks' CPUs.

    An idle rank sleeps in it, which one that waits in a collective on its GPU would not. Collective to create.
    """

    def __init__(self) -> None:
        self._group = distributed.new_group(backend="gloo", timeout=IDLE_TIMEOUT)

    def send(self, step: StepInput) -> None:
        """Rank 0: gives every other rank a step."""
        flat = pack_step(step)
        message = np.zeros(max(_MESSAGE_SIZE, 1 + len(flat)), dtype=np.int64)
        message[0] = len(flat)
        message[1 : 1 + len(flat)] = flat
        self._broadcast(message[:_MESSAGE_SIZE])
        if len(message) > _MESSAGE_SIZE:
            self._broadcast(message[_MESSAGE_SIZE:])

    def receive(self) -> StepInput:
        """Other ranks: blocks until rank 0 sends a step, which may take for ever."""
        message = np.zeros(_MESSAGE_SIZE, dtype=np.int64)
        self._broadcast(message)
        rest = np.zeros(max(0, 1 + int(message[0]) - _MESSAGE_SIZE), dtype=np.int64)
        if len(rest):
            self._broadcast(rest)
        return unpack_step(np.concatenate((message, rest))[1 : 1 + int(message[0])])

    def _broadcast(self, message: NDArray[np.int64]) -> None:
        distributed.broadcast(torch.from_numpy(message), src=0, group=self._group)


def follow(engine: Engine, channel: StepChannel, watchdog: Watchdog) -> None:
    """Other ranks: takes part in every step until the process ends."""
    while True:
        step = channel.receive()
        with watchdog.watch():
            engine.step(step)
            engine.settle()
