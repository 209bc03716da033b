"""Tensors of safetensors files by name, of which parts can be read: no file is mapped for longer than a piece of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PIECE_BYTES = 16 * 1024 * 1024  # of a tensor in its file, which count as memory of this process while they are mapped


class WeightFiles:
    """The tensors of a Hugging Face directory, whether they lie in one file or in several with an index.

    Attributes:
        files: that hold weights, in order of their names.
    """

    def __init__(self, directory: Path) -> None:
        self._file_of = _file_of_tensors(directory)
        self.files = sorted(set(self._file_of.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        with safe_open(self._file_of[name], framework="pt") as weights:
            return tuple(weights.get_slice(name).get_shape())

    def load(self, name: str) -> Tensor:
        """A whole tensor, in the file's dtype."""
        with safe_open(self._file_of[name], framework="pt") as weights:
            tensor: Tensor = weights.get_tensor(name)
            return tensor

    @torch.no_grad()
    def read_into(self, out: Tensor, name: str, dim: int = 0, start: int = 0) -> None:
        """Fills `out` with the part of a tensor that begins at `start` of dimension `dim`, in the dtype of `out`.

        Raises ValueError when the tensor has no such part.
        """
        whole = self.shape(name)
        begins = [start if axis == dim else 0 for axis in range(len(whole))]
        fits = len(whole) == out.dim() and all(
            begin + size <= full for begin, size, full in zip(begins, out.shape, whole, strict=True)
        )
        if not fits:
            raise ValueError(f"model.path: {name} is of shape {list(whole)}; {list(out.shape)} from {start} is wanted")
        if not whole:
            out.copy_(self.load(name))
            return
        at_once = max(1, _PIECE_BYTES // max(1, math.prod(whole[1:]) * out.element_size()))
        index = [slice(begin, begin + size) for begin, size in zip(begins, out.shape, strict=True)]
        for first in range(0, len(out), at_once):
            piece = out[first : first + at_once]
            index[0] = slice(begins[0] + first, begins[0] + first + len(piece))
            # Opened anew: what was read of a mapped file stays in memory until it is closed.
            with safe_open(self._file_of[name], framework="pt") as weights:
                piece.copy_(weights.get_slice(name)[tuple(index)])


def _file_of_tensors(directory: Path) -> dict[str, Path]:
    """The index says which files are meant: some directories have the same weights in other layouts beside them."""
    if (directory / _INDEX).is_file():
        names: dict[str, str] = json.loads((directory / _INDEX).read_text())["weight_map"]
        return {name: directory / file for name, file in names.items()}
    files = [directory / _SINGLE] if (directory / _SINGLE).is_file() else sorted(directory.glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            found.update(dict.fromkeys(weights.keys(), file))
    return found
