"""Reading GGUF files: parsed once for everything that is asked of one, also by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


class GgufFile(gguf.GGUFReader):
    """gguf's reader over a plain view of the mapped file: a `memmap` makes each of 100,000 slices a slow one."""

    @property
    def data(self) -> NDArray[Any]:
        return self._bytes

    @data.setter
    def data(self, mapped: NDArray[Any]) -> None:
        self._bytes = np.asarray(mapped)


@contextmanager
def read_as(path: Path, file: GgufFile) -> Iterator[None]:
    """While this is open, transformers takes `path` as `file`, where it would parse it again for each thing it wants.

    It also asks for the map of tensor names once for every module of the model, which takes longer than all else.
    """
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map

    def read(asked: Any, *args: Any, **options: Any) -> Any:
        return file if Path(asked) == path else reader(asked, *args, **options)

    gguf.GGUFReader, gguf.get_tensor_name_map = read, cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map
