"""Prompts captured from an operator's own traffic: redacted before anything else, forgotten after their time."""

from __future__ import annotations

import time
from collections.abc import Iterator

from dflash_ray.config import ConfigError, TrafficConfig
from dflash_ray.gateway.traffic import forget_old_files, redaction
from dflash_ray.training.prompt_files import Prompt, prompt_of, read_jsonl


def captured_prompts(section: TrafficConfig) -> Iterator[Prompt]:
    """Redacted prompts that are younger than the retention limit; files without any are deleted.

    Raises ValueError that names the line at fault, ConfigError when the redaction cannot be set up.
    """
    if not section.directory.is_dir():
        raise ConfigError(f"prompts.traffic.directory: {section.directory} is not a directory")
    redact = redaction(section, "prompts.traffic")
    oldest = time.time() - section.retention_s
    forget_old_files(section.directory, oldest)
    for path in sorted(section.directory.glob("*.jsonl")):
        for where, record in read_jsonl(path):
            if not isinstance(record.get("time"), int | float):
                raise ValueError(f"{where}: needs `time`, in seconds since 1970")
            if record["time"] < oldest:
                continue
            prompt = prompt_of(record, where, "traffic")
            messages = [{**message, "content": redact(message["content"])} for message in prompt.messages]
            yield Prompt(messages, prompt.source)
