"""Work that hangs is ended; work that ends, and time without work, are not."""

import subprocess
import sys
import threading
import time

from dflash_ray.core.watchdog import Watchdog


def test_work_that_takes_longer_than_its_time_is_ended():
    ended = threading.Event()
    with Watchdog(0.05, "a pass", ended.set).watch():
        assert ended.wait(30)


def test_work_that_is_over_and_idle_time_are_left_alone():
    ended = threading.Event()
    watchdog = Watchdog(0.2, "a pass", ended.set)
    for _ in range(3):
        with watchdog.watch():
            pass
    time.sleep(0.8)
    assert not ended.is_set()


def test_the_process_ends_and_says_where_it_hung():
    code = """
import time
from dflash_ray.core.watchdog import Watchdog
def wait_for_a_dead_peer():
    time.sleep(600)
with Watchdog(0.1, "a pass").watch():
    wait_for_a_dead_peer()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "a pass took longer than" in ended.stderr and "wait_for_a_dead_peer" in ended.stderr
