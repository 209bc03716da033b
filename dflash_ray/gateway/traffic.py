"""Chat prompts kept to train a drafter on: by the operator's choice alone, redacted before they are written."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dflash_ray.config import ConfigError, TrafficConfig
from dflash_ray.text.redaction import forget_old_files, redaction

logger = logging.getLogger(__name__)


class TrafficRecorder:
    """Appends redacted prompts to one JSONL file a day and process, readable by its owner alone.

    Writing happens on a thread of its own, in order of time. What goes wrong there is logged and costs no request.
    Raises ConfigError when the redaction or the directory cannot be used.
    """

    def __init__(self, config: TrafficConfig) -> None:
        self._directory = config.directory
        self._retention_s = config.retention_s
        self._redact = redaction(config, "gateway.traffic")
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"gateway.traffic.directory: {error}") from None
        self._day = ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="traffic")

    def record(self, messages: Sequence[dict[str, str]]) -> None:
        """Takes the messages of an accepted chat; returns at once."""
        self._thread.submit(self._write, list(messages), time.time())

    def close(self) -> None:
        """Waits until all is written."""
        self._thread.shutdown()

    def _write(self, messages: list[dict[str, str]], now: float) -> None:
        try:
            day = time.strftime("%Y-%m-%d", time.gmtime(now))
            if day != self._day:
                forget_old_files(self._directory, now - self._retention_s)
                self._day = day
            redacted = [{**message, "content": self._redact(message["content"])} for message in messages]
            line = json.dumps({"messages": redacted, "time": now}, ensure_ascii=False) + "\n"
            path = self._directory / f"{day}-{os.getpid()}.jsonl"
            with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", encoding="utf-8") as stream:
                stream.write(line)
        except Exception as error:  # a hook may raise anything; its text might hold the prompt
            logger.warning("a prompt was not recorded: %s", type(error).__name__)
