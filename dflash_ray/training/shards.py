"""Answered conversations with the target's taps: Parquet files, a row group for each conversation.

A shard is written whole (renamed into place) and holds the conversations of one range of prompts, so a run that was
killed goes on with the shards that are missing, and nothing is answered twice.

Columns: prompt (JSON of the messages), source, temperature, prompt_len, token_ids (prompt and answer, T of them) and
taps, the raw outputs of the tapped layers for the first T - 1 tokens: bfloat16 [T - 1, layers, H], little-endian; null
where no layer was tapped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dflash_ray.core.files import replacing
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import Prompt

_MAX_OPEN_FILES = 256
_LAYOUT_KEY, _LEFT_OUT_KEY = b"dflash_ray", b"dflash_ray_left_out"
_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("source", pa.string()),
        ("temperature", pa.float32()),
        ("prompt_len", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("taps", pa.binary()),
    ]
)
_LIGHT_COLUMNS = ["prompt", "source", "temperature", "prompt_len", "token_ids"]


@dataclass(frozen=True)
class TapLayout:
    """What the taps of a shard are; shards of one training agree in it.

    Attributes:
        target: fingerprint of the target's weights.
        layer_ids: tapped decoder layers, in order of concatenation.
    """

    target: str
    layer_ids: tuple[int, ...]
    hidden_size: int


@dataclass(frozen=True)
class Answered:
    """One conversation: token_ids are prompt and answer, taps bfloat16 [T - 1, layers * H] or None."""

    prompt: Prompt
    temperature: float
    prompt_len: int
    token_ids: list[int]
    taps: Tensor | None


@dataclass(frozen=True)
class Conversation:
    """A stored conversation without its taps; token_ids int64 [T]."""

    prompt: Prompt
    temperature: float
    prompt_len: int
    token_ids: Tensor


def write_shard(
    path: Path, layout: TapLayout, answered: Sequence[Answered], left_out: Sequence[tuple[str, str]] = ()
) -> None:
    """Writes one shard, with places and reasons of what was left out of it. Raises DiskFullError."""
    metadata = {_LAYOUT_KEY: json.dumps(asdict(layout)), _LEFT_OUT_KEY: json.dumps(list(left_out))}
    schema = _SCHEMA.with_metadata({key: text.encode() for key, text in metadata.items()})
    # Python's own file, so that a full disk is an OSError with its number.
    with (
        replacing(path) as partial,
        partial.open("wb") as stream,
        pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        for one in answered:
            row = {
                "prompt": json.dumps(one.prompt.messages),
                "source": one.prompt.source,
                "temperature": one.temperature,
                "prompt_len": one.prompt_len,
                "token_ids": one.token_ids,
                "taps": None if one.taps is None else one.taps.contiguous().view(torch.int16).numpy().tobytes(),
            }
            writer.write_table(pa.Table.from_pylist([row], schema=schema))


class ShardStore:
    """All conversations of directories of shards; tokens are in memory, taps are read when asked for.

    Attributes:
        paths: of the shards by name: the file's, after the number of its directory where there are several.
    """

    def __init__(self, *directories: Path) -> None:
        self.paths: dict[str, Path] = {}
        for number, directory in enumerate(directories, start=1):
            paths = sorted(directory.glob("*.parquet"))
            if not paths:
                raise ValueError(
                    f"{directory}: there are no shards; run `dflash-ray train regenerate` or `capture` first"
                )
            prefix = f"{number}/" if len(directories) > 1 else ""
            self.paths |= {f"{prefix}{path.name}": path for path in paths}
        self._open = lru_cache(maxsize=_MAX_OPEN_FILES)(_open)
        layouts = {_read_layout(self._open(path), path) for path in self.paths.values()}
        if len(layouts) > 1:
            places = ", ".join(map(str, directories))
            raise ValueError(f"{places}: the shards differ in target or layers; keep each kind in its own work_dir")
        self.layout = layouts.pop()
        self.conversations: list[Conversation] = []
        self._places: list[tuple[Path, int]] = []  # file and row group of each conversation
        for path in self.paths.values():
            with _naming(path):
                rows = self._open(path).read(columns=_LIGHT_COLUMNS).to_pylist()
            for group, row in enumerate(rows):
                prompt = Prompt(json.loads(row["prompt"]), row["source"])
                token_ids = torch.tensor(row["token_ids"], dtype=torch.int64)
                self.conversations.append(Conversation(prompt, row["temperature"], row["prompt_len"], token_ids))
                self._places.append((path, group))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the conversations and of what their taps are of, in whatever files they lie."""
        digest = hashlib.sha256(json.dumps(asdict(self.layout)).encode())
        for one in self.conversations:
            digest.update(f"{one.prompt.digest}:{one.prompt_len}:{len(one.token_ids)}:".encode())
            digest.update(one.token_ids.numpy().tobytes())
        return digest.hexdigest()[:16]

    def taps(self, index: int, layer_ids: Sequence[int]) -> Tensor:
        """Taps of a conversation, bfloat16 [T - 1, len(layer_ids) * H]."""
        path, group = self._places[index]
        with _naming(path):
            buffer = self._open(path).read_row_group(group, columns=["taps"])["taps"][0].as_buffer()
        rows = np.frombuffer(buffer, dtype=np.int16).reshape(-1, len(self.layout.layer_ids), self.layout.hidden_size)
        at = [self.layout.layer_ids.index(layer) for layer in layer_ids]
        return torch.from_numpy(rows[:, at].reshape(len(rows), -1)).view(torch.bfloat16)


def count_shard(path: Path, left_out: LeftOut) -> int:
    """The number of conversations in a shard; what was left out of it is counted."""
    file = _open(path)
    for place, reason in json.loads((file.schema_arrow.metadata or {}).get(_LEFT_OUT_KEY, b"[]")):
        left_out.add(place, reason)
    return int(file.metadata.num_rows)


def _open(path: Path) -> pq.ParquetFile:
    with _naming(path):
        return pq.ParquetFile(path, memory_map=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What pyarrow cannot read is an error that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is not a whole shard ({error}); delete it and run `regenerate` again") from None


def _read_layout(file: pq.ParquetFile, path: Path) -> TapLayout:
    text = (file.schema_arrow.metadata or {}).get(_LAYOUT_KEY)
    if text is None:
        raise ValueError(f"{path}: was not written by dflash-ray train")
    values = json.loads(text)
    return TapLayout(values["target"], tuple(values["layer_ids"]), values["hidden_size"])
