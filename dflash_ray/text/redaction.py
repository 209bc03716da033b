"""What is taken out of prompts that are kept, and when they are forgotten."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

from dflash_ray.config import ConfigError, TrafficConfig

_BLANK = "[redacted]"


def redaction(config: TrafficConfig, where: str) -> Callable[[str], str]:
    """The configured patterns and then the hook, as one function. Raises ConfigError; `where` holds the key."""
    patterns = [re.compile(pattern) for pattern in config.redact_patterns]
    hook = _load_hook(config.redact_hook, where) if config.redact_hook else str

    def redact(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(_BLANK, text)
        return hook(text)

    return redact


def _load_hook(path: str, where: str) -> Callable[[str], str]:
    module, _, name = path.partition(":")
    try:
        hook: Callable[[str], str] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}.redact_hook: {path} is not module:function ({error})") from None
    return hook


def forget_old_files(directory: Path, oldest: float) -> None:
    """Deletes files that were last appended to before `oldest`: nothing in them is younger."""
    for path in directory.glob("*.jsonl"):
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
