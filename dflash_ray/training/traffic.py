"""Prompts captured from an operator's own traffic: redacted before anything else, forgotten after their time."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterator

from dflash_ray.config import ConfigError
from dflash_ray.training.config import TrafficSection
from dflash_ray.training.prompt_files import Prompt, prompt_of, read_jsonl

_SECONDS_A_DAY = 86400.0
_BLANK = "[redacted]"


def captured_prompts(section: TrafficSection) -> Iterator[Prompt]:
    """Redacted prompts that are younger than the retention limit; files without any are deleted.

    Raises ValueError that names the line at fault, ConfigError when the redaction cannot be set up.
    """
    if not section.directory.is_dir():
        raise ConfigError(f"prompts.traffic.directory: {section.directory} is not a directory")
    redact = redaction(section)
    oldest = time.time() - section.retention_days * _SECONDS_A_DAY
    for path in sorted(section.directory.glob("*.jsonl")):
        if path.stat().st_mtime < oldest:  # appended to in order of time: nothing in it is younger
            path.unlink()
            continue
        for where, record in read_jsonl(path):
            if not isinstance(record.get("time"), int | float):
                raise ValueError(f"{where}: needs `time`, in seconds since 1970")
            if record["time"] < oldest:
                continue
            prompt = prompt_of(record, where, "traffic")
            messages = [{**message, "content": redact(message["content"])} for message in prompt.messages]
            yield Prompt(messages, prompt.source)


def redaction(section: TrafficSection) -> Callable[[str], str]:
    """The configured patterns and then the hook, as one function. Raises ConfigError that names the key at fault."""
    try:
        patterns = [re.compile(pattern) for pattern in section.redact_patterns]
    except re.error as error:
        raise ConfigError(f"prompts.traffic.redact_patterns: {error}") from None
    hook = _load_hook(section.redact_hook) if section.redact_hook else str

    def redact(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(_BLANK, text)
        return hook(text)

    return redact


def _load_hook(path: str) -> Callable[[str], str]:
    module, _, name = path.partition(":")
    try:
        hook: Callable[[str], str] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"prompts.traffic.redact_hook: {path} is not module:function ({error})") from None
    return hook
