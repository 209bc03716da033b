"""Ray for a step that is spread over workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

_WORKER_ENV = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster of RAY_ADDRESS, or Ray on this machine's loopback interface; one that is joined already is kept."""
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    local: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    where = {} if "RAY_ADDRESS" in os.environ else local
    ray.init(runtime_env={"env_vars": _WORKER_ENV}, logging_level=logging.WARNING, **where)
    try:
        yield
    finally:
        ray.shutdown()
