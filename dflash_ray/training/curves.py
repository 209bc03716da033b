"""Loss and acceptance length over the steps: a JSONL file, TensorBoard event files and a PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from dflash_ray.core.files import replacing, write_text

_CURVES = ("loss", "acceptance_length")
_PARTS = ("train", "held_out", "followed")


class Curves:
    """Appends points; a resumed run replaces the points after its checkpoint.

    Args:
        step: of the checkpoint that the run goes on from.
    """

    def __init__(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._file = directory / "curves.jsonl"
        self.points: list[dict[str, Any]] = []
        if self._file.exists():
            points = (_point_of(line) for line in self._file.read_text().splitlines())
            self.points += [point for point in points if point is not None and point["step"] <= step]
        write_text(self._file, "".join(json.dumps(point) + "\n" for point in self.points))
        self._events = SummaryWriter(str(directory / "events"), purge_step=step)

    def add(self, step: int, part: str, **values: float | dict[str, float]) -> None:
        """Adds values of `part` (train, held_out or followed); those by category are one curve a category."""
        self.points.append({"step": step, "part": part, **values})
        with self._file.open("a") as stream:
            stream.write(json.dumps(self.points[-1]) + "\n")
        for name, value in values.items():
            if isinstance(value, dict):
                self._events.add_scalars(f"{name}/{part}", value, step)
            else:
                self._events.add_scalar(f"{name}/{part}", value, step)

    def close(self) -> None:
        """Flushes the event files and draws the PNG."""
        self._events.close()
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(_CURVES)), _CURVES, strict=True):
            for part in _PARTS:
                points = [point for point in self.points if point["part"] == part and name in point]
                if not points:
                    continue
                axis.plot([p["step"] for p in points], [p[name] for p in points], label=part.replace("_", " "))
            axis.set(xlabel="step", ylabel=name.replace("_", " "))
            if axis.lines:
                axis.legend()
        with replacing(self._directory / "curves.png") as partial:
            figure.savefig(partial, format="png")


def _point_of(line: str) -> dict[str, Any] | None:
    """A kill may cut the last line."""
    try:
        point: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return point
