"""The operators' threads: any number of them, several callers, forked children, threads that lose their core."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from dflash_ray.kernels import build

pytestmark = pytest.mark.skipif(
    not build.is_loaded_for("cpu"), reason="no C++ compiler: operators run in plain torch here"
)
ROUNDS = 200


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 320, generator=generator)
    return torch.randn(9, 320, generator=generator), torch.ops.dflash_ray.pack_linear(weight)


def product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return torch.ops.dflash_ray.packed_linear(x, packed, None, 700)


def alone(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    torch.set_num_threads(1)
    return product(x, packed)


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_any_number_of_threads_gives_the_same_bits_over_and_over(threads):
    x, packed = operands()
    expected = alone(x, packed)
    torch.set_num_threads(threads)
    assert all(torch.equal(product(x, packed), expected) for _ in range(ROUNDS))


def test_callers_that_come_at_the_same_time_all_get_their_results():
    x, packed = operands()
    expected = alone(x, packed)
    failures: list[int] = []

    def call(caller: int) -> None:
        torch.set_num_threads(2)
        for _ in range(ROUNDS):
            if not torch.equal(product(x[caller:], packed), expected[caller:]):
                failures.append(caller)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


FORKS = """
import os, threading, torch
from tests.unit.kernels.test_team import alone, operands, product
x, packed = operands()
expected = alone(x, packed)
torch.set_num_threads(2)
running = True
def keep_busy():
    torch.set_num_threads(2)
    while running:
        product(x, packed)
other = threading.Thread(target=keep_busy)
other.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(x, packed), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(product(x, packed), expected)
running = False
other.join()
"""


@pytest.mark.timeout(120)
def test_a_child_forked_in_the_middle_of_a_run_has_a_team_of_its_own():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def test_more_threads_than_cores_beside_busy_ones_lose_no_piece():
    x, packed = operands()
    expected = alone(x, packed)
    stop = threading.Event()

    def keep_a_core_busy() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            torch.mm(x, x.T)

    others = [threading.Thread(target=keep_a_core_busy) for _ in range(os.cpu_count() or 1)]
    for other in others:
        other.start()
    try:
        torch.set_num_threads(2 * (os.cpu_count() or 1))
        assert all(torch.equal(product(x, packed), expected) for _ in range(ROUNDS))
    finally:
        stop.set()
        for other in others:
            other.join()
