"""Memory that processes of one machine share, without a name that outlives them.

It is a file that is nowhere in a file system: others open it by its maker's process id and descriptor, and it is
gone with the last process that has it mapped, however that one ended. Only processes of the same user that see each
other's ids get at it, so who cannot open it is on another machine or in another container.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Memory that this process made.

    Attributes:
        pid, fd: by which others of this machine open it.
        name: random, by which they know that it is this one.
        memory: zeros, taken from the machine where they are first touched.
    """

    pid: int
    fd: int
    name: str
    memory: mmap.mmap


def create(num_bytes: int) -> SharedMemory | None:
    """Shared memory of this size; None where the system has none to give."""
    if sys.platform != "linux":
        return None
    name = f"dflash_ray-{secrets.token_hex(16)}"
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return None
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, num_bytes)
    # Who has it mapped can rely on its size.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return SharedMemory(os.getpid(), fd, name, mmap.mmap(fd, num_bytes))


def open_shared(pid: int, fd: int, name: str, num_bytes: int) -> mmap.mmap:
    """The memory `name` of another process, for reading. Raises OSError where it is not to be had."""
    path, wanted = f"/proc/{pid}/fd/{fd}", f"/memfd:{name} (deleted)"
    if os.readlink(path) != wanted:  # before anything is opened that may be of another kind
        raise FileNotFoundError(f"{path} is not {name}")
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if os.readlink(f"/proc/self/fd/{opened}") != wanted or os.fstat(opened).st_size != num_bytes:
            raise FileNotFoundError(f"{path} is not {name} of {num_bytes} bytes")
        return mmap.mmap(opened, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(opened)
