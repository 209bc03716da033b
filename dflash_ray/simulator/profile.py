"""The times of one machine and model, as JSON."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dflash_ray.config import ConfigError

_BUILT_IN = importlib.resources.files("dflash_ray") / "assets" / "profiles"
_Seconds = Annotated[float, Field(ge=0)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Times(_Table):
    """Seconds by a count, straight between the given points, and on with the last slope beyond them."""

    at: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    seconds: tuple[_Seconds, ...]

    @model_validator(mode="after")
    def _check(self) -> Times:
        if len(self.at) != len(self.seconds) or any(a >= b for a, b in zip(self.at, self.at[1:], strict=False)):
            raise ValueError("`at` must rise, and have as many elements as `seconds`")
        return self

    def __call__(self, count: float) -> float:
        at, seconds = self.at, self.seconds
        if count > at[-1]:
            slope = (seconds[-1] - seconds[-2]) / (at[-1] - at[-2]) if len(at) > 1 else 0.0
            return seconds[-1] + max(0.0, slope) * (count - at[-1])
        return float(np.interp(count, at, seconds))


class Profile(_Table):
    """What passes take on a machine.

    Attributes:
        source: where the figures come from, in words.
        passes: of the target, by rows, one sequence with next to no context.
        per_sequence: that each further sequence adds to a pass.
        per_context_token: that each token of context adds to a pass.
        prefill: of a prompt's rows alone.
        drafts: of a drafter, by sequences drafted for.
        per_slot: that each slot adds to a draft; 0 for blocks that are drafted whole.
        per_draft_row: that each new context row adds to a draft.
        draft_len: drafts of a block.
        host: from a pass's end to the next one, where that waits for the result, without any draft: router, codecs,
            wires; by sequences.
        ask: what asking a remote drafter takes beyond its pass, by sequences.
        cores: that target, drafters, router, gateway and clients share; 0 where none waits for another's.
        pass_cores, draft_cores: of them that a pass, or a draft, keeps busy.
        beside: seconds of one core that router, gateway and clients compute a step, while others compute, by sequences.
    """

    name: str
    model: str
    device: str
    date: str
    source: str
    passes: Times
    per_sequence: _Seconds = 0.0
    per_context_token: _Seconds = 0.0
    prefill: Times
    drafts: Times
    per_slot: _Seconds = 0.0
    per_draft_row: _Seconds = 0.0
    draft_len: int = Field(ge=1, le=31)
    host: Times = Times(at=(1,), seconds=(0.0,))
    ask: Times = Times(at=(1,), seconds=(0.0,))
    cores: float = Field(0.0, ge=0)
    pass_cores: float = Field(1.0, gt=0)
    draft_cores: float = Field(1.0, gt=0)
    beside: Times = Times(at=(1,), seconds=(0.0,))
    max_batch_tokens: int = Field(512, ge=16)
    kv_cache_tokens: int = Field(32768, ge=64)
    max_model_len: int = Field(8192, ge=16)
    schema_version: Literal[2] = 2

    def pass_seconds(self, num_sequences: int, rows: int, context_tokens: int, prefill_rows: int) -> float:
        """Of one target pass; `rows` are those of sequences that decode."""
        seconds = self.per_context_token * context_tokens + self.per_sequence * max(0, num_sequences - 1)
        if rows:
            seconds += self.passes(rows)
        if prefill_rows:  # weights are read once for both
            alone = self.prefill(prefill_rows)
            seconds += alone if not rows else max(0.0, alone - self.passes(1))
        return seconds

    def draft_seconds(self, num_sequences: int, num_slots: int, new_rows: int) -> float:
        """Of one drafter's pass."""
        if not num_sequences:
            return self.per_draft_row * new_rows
        return self.drafts(num_sequences) + self.per_slot * num_slots + self.per_draft_row * new_rows


def built_in_profiles() -> list[str]:
    """Names of the profiles that come along."""
    return sorted(entry.name.removesuffix(".json") for entry in _BUILT_IN.iterdir() if entry.name.endswith(".json"))


def load_profile(name: str) -> Profile:
    """Reads a profile that comes along, or a file. Raises ConfigError that names what is wrong."""
    entry = _BUILT_IN / f"{name}.json"
    path = Path(name)
    try:
        text = entry.read_text() if entry.is_file() else path.read_text()
    except OSError as error:
        known = ", ".join(built_in_profiles())
        raise ConfigError(f"profile {name}: {error.strerror}; give a file, or one of {known}") from None
    try:
        return Profile.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"profile {name}: not JSON ({error})") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"profile {name}: " + "; ".join(lines)) from None
