"""Prompts recorded from an operator's own traffic: redacted before anything else, forgotten after their time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from dflash_ray.config import ConfigError, TrafficConfig
from dflash_ray.text.redaction import forget_old_files, redaction
from dflash_ray.training.left_out import BadRow, LeftOut
from dflash_ray.training.prompt_files import Prompt, prompt_of, read_jsonl


def recorded_prompts(section: TrafficConfig, left_out: LeftOut) -> Iterator[Prompt]:
    """Redacted prompts that are younger than the retention limit; files without any are deleted.

    Raises ConfigError when the redaction cannot be set up.
    """
    if not section.directory.is_dir():
        raise ConfigError(f"prompts.traffic.directory: {section.directory} is not a directory")
    redact = redaction(section, "prompts.traffic")
    oldest = time.time() - section.retention_s
    forget_old_files(section.directory, oldest)
    for path in sorted(section.directory.glob("*.jsonl")):
        for place, record in read_jsonl(path, left_out):
            try:
                if _time_of(record) >= oldest:
                    yield _redacted(prompt_of(record, place, "traffic"), redact)
            except BadRow as bad:
                left_out.add(place, bad)


def _time_of(record: dict[str, Any]) -> float:
    recorded = record.get("time")
    if isinstance(recorded, bool) or not isinstance(recorded, int | float) or not math.isfinite(recorded):
        raise BadRow("without `time`, in seconds since 1970")
    return recorded


def _redacted(prompt: Prompt, redact: Callable[[str], str]) -> Prompt:
    """Raises BadRow for what the redaction does not get through: nothing passes it by."""
    try:
        contents = [redact(message["content"]) for message in prompt.messages]
    except Exception as error:  # a hook may raise anything; its text might hold the prompt
        raise BadRow(f"whose redaction failed with {type(error).__name__}") from None
    messages = [{**old, "content": content} for old, content in zip(prompt.messages, contents, strict=True)]
    return prompt_of({"messages": messages}, prompt.place, prompt.source)
