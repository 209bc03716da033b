"""Files that are whole or absent, and a full disk as an error that says how to go on."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DiskFullError(ValueError):
    """There is no room for a file; what was written before is whole, and the step can be run again."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` when the block ends without an error.

    The bytes are on the disk before the name is, so a machine that stops leaves the old file or the new one.
    Raises DiskFullError when the block fails for want of room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except Exception as error:
        if not _is_disk_full(error):
            raise
        partial.unlink(missing_ok=True)
        raise DiskFullError(
            f"no space left for {path}; what was written before is whole: free space and run the step again"
        ) from error


def _is_disk_full(error: Exception) -> bool:
    """safetensors passes the operating system's error on as text, in an error of its own."""
    return getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    with replacing(path) as partial:
        partial.write_text(text)


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
