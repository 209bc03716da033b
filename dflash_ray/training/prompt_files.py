"""Prompts as JSONL, plain or compressed by gzip. Errors name the file and the line."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_ray.core.files import write_text

Messages = list[dict[str, str]]
_MIXER = 0x9E3779B97F4A7C15  # odd, so that orders differ; the split goes by the size of digests
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the assistant's turn.

    Attributes:
        source: where it comes from; a category in evaluations.
    """

    messages: Messages
    source: str

    @property
    def text(self) -> str:
        """What the user last said."""
        return self.messages[-1]["content"]

    @property
    def digest(self) -> int:
        """64 bits that depend on the messages alone: split, seed and temperature follow from it."""
        text = json.dumps([[message["role"], message["content"]] for message in self.messages])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    @property
    def order(self) -> int:
        """Mixes prompts the same way each time, whichever side of the split they are on."""
        return _MIXER * self.digest % 2**64

    def is_held_out(self, fraction: float) -> bool:
        """The same prompt always falls on the same side."""
        return self.digest / 2**64 < fraction


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSONL file, each with `file, line n` for errors. Raises ValueError for anything else."""
    if path.suffix in _PICKLES:
        raise ValueError(f"{path}: pickles are never loaded; convert it to JSONL")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    is_empty = True
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        for number, line in enumerate(_lines(stream, path), start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{where}: is not JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: must be an object")
            is_empty = False
            yield where, record
    if is_empty:
        raise ValueError(f"{path}: is empty")


def _lines(stream: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from stream
    except (EOFError, OSError, zlib.error) as error:  # cut off, or no gzip at all
        raise ValueError(f"{path}: cannot be unpacked ({error}); copy it again") from None


def default_source(path: Path) -> str:
    """The name of a file without what says its format."""
    return Path(path.name.removesuffix(".gz")).stem


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file; `source` defaults to the file's name."""
    return [prompt_of(record, where, default_source(path)) for where, record in read_jsonl(path)]


def prompt_of(record: dict[str, Any], where: str, source: str) -> Prompt:
    """A prompt from `prompt` or `messages`; what an assistant said last is left out. Raises ValueError."""
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not is_chat:
        raise ValueError(f"{where}: needs `prompt`, a text, or `messages`, a list of role and content")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or not turns[-1]["content"].strip():
        raise ValueError(f"{where}: the user says nothing")
    return Prompt(turns, str(record.get("source", source)))


def write_prompts(path: Path, prompts: list[Prompt]) -> None:
    """One object a line; replaces the file."""
    lines = [json.dumps({"messages": prompt.messages, "source": prompt.source}) + "\n" for prompt in prompts]
    write_text(path, "".join(lines))
