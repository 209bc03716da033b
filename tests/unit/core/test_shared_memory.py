"""Memory of one process that another one of the same machine reads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dflash_ray.core.shared_memory import SharedMemory, create, open_shared

SIZE = 8192
READER = """
import sys
from dflash_ray.core.shared_memory import open_shared
pid, fd, name, size = sys.argv[1:]
memory = open_shared(int(pid), int(fd), name, int(size))
print(memory[:5].decode(), flush=True)
input()
print(memory[:5].decode())
"""


@pytest.fixture
def shared() -> SharedMemory:
    memory = create(SIZE)
    assert memory is not None
    return memory


def test_another_process_reads_what_is_written_before_and_after_it_came(shared):
    shared.memory[:5] = b"first"
    arguments = [str(shared.pid), str(shared.fd), shared.name, str(SIZE)]
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout.readline() == "first\n"
    shared.memory[:5] = b"again"
    assert reader.communicate("\n", timeout=60)[0] == "again\n"


def test_readers_cannot_write(shared):
    memory = open_shared(shared.pid, shared.fd, shared.name, SIZE)
    with pytest.raises(TypeError):
        memory[0] = 1


def test_two_memories_have_different_names(shared):
    other = create(SIZE)
    assert other is not None and other.name != shared.name


@pytest.mark.parametrize("wrong", [{"name": "another"}, {"fd": 0}, {"fd": 10**6}, {"num_bytes": SIZE + 1}], ids=str)
def test_what_is_not_the_memory_is_refused(shared, wrong):
    place = {"pid": shared.pid, "fd": shared.fd, "name": shared.name, "num_bytes": SIZE}
    with pytest.raises(OSError):
        open_shared(**(place | wrong))


def test_memory_of_a_process_that_has_ended_is_refused(shared):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(OSError):
        open_shared(ended.pid, shared.fd, shared.name, SIZE)
