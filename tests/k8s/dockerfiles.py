"""What an image's recipe says, as far as the tests ask."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "deployments/docker"


@dataclass(frozen=True, slots=True)
class Image:
    """Instructions in order, of all stages and of the last."""

    instructions: list[tuple[str, str]]

    @property
    def last_stage(self) -> list[tuple[str, str]]:
        start = max(i for i, (name, _) in enumerate(self.instructions) if name == "FROM")
        return self.instructions[start:]

    def one(self, name: str) -> str:
        """The arguments of the last stage's last instruction of a name: that is the one that counts."""
        return [arguments for instruction, arguments in self.last_stage if instruction == name][-1]

    @property
    def env(self) -> dict[str, str]:
        """What the last stage sets, without PATH."""
        pairs = [pair for name, arguments in self.last_stage if name == "ENV" for pair in shlex.split(arguments)]
        return {key: value for key, _, value in (pair.partition("=") for pair in pairs) if key != "PATH"}

    @property
    def command(self) -> list[str]:
        return json.loads(self.one("CMD"))

    @property
    def health_command(self) -> list[str]:
        return json.loads(self.one("HEALTHCHECK").partition(" CMD ")[2])


def read(name: str) -> Image:
    """A recipe of deployments/docker."""
    text = re.sub(r"\\\n\s*", " ", (FOLDER / name).read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return Image([(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines])
