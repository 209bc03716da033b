"""Prompts as JSONL or one JSON array, plain or compressed by gzip, in the layouts that people share chats in.

What is wrong with a row is counted with its file and line; what is wrong with a whole file is an error that names it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from dflash_ray.core.errors import RequestError
from dflash_ray.core.files import write_text
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.left_out import BadRow, LeftOut

Messages = list[dict[str, str]]
_MIXER = 0x9E3779B97F4A7C15  # odd, so that orders differ; the split goes by the size of digests
# The answers that ShareGPT's copies hold are of several programs.
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
_WANTED = "without `prompt`, a text, `messages`, of role and content, or `conversations`, of from and value"
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the assistant's turn.

    Attributes:
        source: where it comes from; a category in evaluations.
        place: file and line that it was read from.
    """

    messages: Messages
    source: str
    place: str = field(default="", compare=False)

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


def read_jsonl(path: Path, left_out: LeftOut) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file, each with its place, `file, line n`; what is none is left out.

    A file named .json (or .json.gz) that begins with a bracket is one array, whose items are counted in place of lines.
    Raises ValueError for a file that cannot be read at all.
    """
    if path.suffix in _PICKLES:
        raise ValueError(f"{path}: pickles are never loaded; convert it to JSONL")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    is_empty = True
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        for place, text in _rows(stream, path):
            is_empty = False
            try:
                yield place, _object_of(text)
            except BadRow as bad:
                left_out.add(place, bad)
    if is_empty:
        left_out.add(str(path), "without a line")


def _rows(stream: gzip.GzipFile | BufferedReader, path: Path) -> Iterator[tuple[str, Any]]:
    """Lines that are not blank, or the items of an array, each with its place."""
    try:
        if Path(path.name.removesuffix(".gz")).suffix == ".json" and (whole := stream.read()).lstrip()[:1] == b"[":
            for number, item in enumerate(json.loads(whole), start=1):
                yield f"{path}, item {number}", item
            return
        stream.seek(0)
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{path}, line {number}", line
    except (EOFError, OSError, zlib.error) as error:  # cut off, or no gzip at all
        raise ValueError(f"{path}: cannot be unpacked ({error}); copy it again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not a JSON array ({error}); copy it again, or give JSONL") from None


def _object_of(row: Any) -> dict[str, Any]:
    try:
        record = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        raise BadRow("not JSON") from None
    if not isinstance(record, dict):
        raise BadRow("not an object")
    return record


def default_source(path: Path) -> str:
    """The name of a file without what says its format."""
    return Path(path.name.removesuffix(".gz")).stem


def read_prompts(path: Path, left_out: LeftOut) -> list[Prompt]:
    """Prompts of a file; `source` defaults to the file's name."""
    prompts = []
    for place, record in read_jsonl(path, left_out):
        try:
            prompts.append(prompt_of(record, place, default_source(path)))
        except BadRow as bad:
            left_out.add(place, bad)
    return prompts


def prompt_of(record: dict[str, Any], place: str, source: str) -> Prompt:
    """A prompt from `messages`, `conversations` or `prompt`; what an assistant said last is left out. Raises BadRow."""
    turns = _turns_of(record)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] == "system" or not turns[-1]["content"].strip():
        raise BadRow("without words of the user")
    prompt = Prompt(turns, str(record.get("source") or source), place)
    try:
        for text in (prompt.source, *(part for turn in turns for part in turn.values())):
            text.encode()
    except UnicodeEncodeError:
        raise BadRow("with half a surrogate pair, which is no text") from None
    return prompt


def _turns_of(record: dict[str, Any]) -> Messages:
    """Roles and contents, in OpenAI's words: those of ShareGPT (`from`, `value`) are translated."""
    chat = next((record[key] for key in ("messages", "conversations") if record.get(key) is not None), None)
    if chat is None:
        chat = [{"role": "user", "content": record.get("prompt")}]
    if not isinstance(chat, list):
        raise BadRow(_WANTED)
    turns: Messages = []
    for turn in chat:
        if not isinstance(turn, dict):
            raise BadRow(_WANTED)
        role, content = turn.get("role"), turn.get("content")
        if "from" in turn:
            role, content = turn["from"], turn.get("value")
            if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
                raise BadRow("with a turn from none of human, gpt and system")
            role = _SHAREGPT_ROLES[role]
            if role == "assistant" and not any(one["role"] == "user" for one in turns):
                continue  # the beginning of the conversation was cut off
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(_WANTED)
        turns.append({"role": role, "content": content})
    return turns


def tokens_of(prompt: Prompt, tokenizer: ChatTokenizer) -> list[int]:
    """Tokens up to the assistant's turn. Raises BadRow when the chat template makes none of it."""
    try:
        token_ids = tokenizer.encode_chat(prompt.messages)
    except (RequestError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # a template is a program
        raise BadRow(f"without tokens: {error}") from None
    if not token_ids:
        raise BadRow("without tokens: the chat template leaves nothing")
    return token_ids


def write_prompts(path: Path, prompts: list[Prompt]) -> None:
    """One object a line; replaces the file."""
    lines = [json.dumps({"messages": prompt.messages, "source": prompt.source}) + "\n" for prompt in prompts]
    write_text(path, "".join(lines))
