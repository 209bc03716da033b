"""How many tokens the KV cache holds where `target.kv_cache_tokens` is auto: what fits into the memory that is left.

Asked once weights are loaded, on every rank; the smallest answer is the group's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dflash_ray.config import DflashRayConfig
from dflash_ray.models.dflash import DflashConfig

GIB = 2**30
CPU_SHARE = 0.25  # of the memory that is available when the rank has loaded
CUDA_RESERVE_BYTES = GIB  # beside a pass's logits: activations, workspaces of libraries, fragments
_LOGITS_BYTES = 8  # a value: the head's output, and a copy in float32
_FEWEST_TOKENS = 64  # as the configuration's own bound


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a rank's device, in bytes.

    Attributes:
        free: what nobody uses.
        total: all there is.
        own: what this process holds already.
    """

    free: int
    total: int
    own: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What one rank has for the rows of its cache, and how that was reckoned."""

    num_bytes: int
    arithmetic: str


def device_memory() -> Memory:
    """Of the current CUDA device."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return Memory(free, total, torch.cuda.memory_reserved())


def host_memory(root: Path = Path("/")) -> Memory:
    """Of this machine or, where that is less, of the container's limit.

    Args:
        root: where `proc` and `sys` are.
    """
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines}
    free, total = sizes["MemAvailable:"], sizes["MemTotal:"]
    group = root / "sys/fs/cgroup"
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        free, total = min(free, limit - (used or 0)), limit
    return Memory(max(0, free), total, 0)


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit in it."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def cuda_budget(
    memory: Memory, num_gpus: float, max_batch_tokens: int, rank_vocab_size: int, pass_bytes: int
) -> Budget:
    """All that is free, or what is left of this process's fraction of the GPU, less a reserve.

    Args:
        pass_bytes: what passes of fixed shapes will take.
    """
    fraction = int(num_gpus * memory.total) - memory.own
    reserve = CUDA_RESERVE_BYTES + max_batch_tokens * rank_vocab_size * _LOGITS_BYTES
    room = min(memory.free, fraction) - reserve - pass_bytes
    return Budget(
        max(0, room),
        f"min({_gib(memory.free)} free, {num_gpus:g} of {_gib(memory.total)} less {_gib(memory.own)} held) less "
        f"{_gib(reserve)} in reserve (1 GiB and the logits of {max_batch_tokens} rows) and {_gib(pass_bytes)} for "
        "passes of fixed shapes and their graphs",
    )


def cpu_budget(memory: Memory, ranks_on_host: int) -> Budget:
    """A share of what is available, divided among the ranks of this machine."""
    return Budget(
        int(memory.free * CPU_SHARE) // ranks_on_host,
        f"{CPU_SHARE:g} of {_gib(memory.free)} available over {ranks_on_host} rank(s) of this machine",
    )


def tokens_that_fit(budget: Budget, row_bytes: int, page_size: int, most: int | None) -> int:
    """Tokens in whole pages; `most` is the number beyond which more are of no use."""
    tokens = budget.num_bytes // row_bytes
    if most is not None:
        tokens = min(tokens, -(-most // page_size) * page_size)
    return tokens // page_size * page_size


def context_row_bytes(drafter: DflashConfig, dtype: torch.dtype) -> int:
    """Of a colocated drafter's keys and values of a position, which grow by doubling."""
    heads = drafter.num_hidden_layers * drafter.num_key_value_heads
    return 2 * 2 * heads * drafter.head_dim * dtype.itemsize


def rank_budget(config: DflashRayConfig, rank_vocab_size: int, ranks_on_host: int, pass_bytes: int) -> Budget:
    """What this rank has now; `pass_bytes` as in `cuda_budget`."""
    if config.target.device == "cuda":
        target = config.target
        return cuda_budget(device_memory(), target.num_gpus, target.max_batch_tokens, rank_vocab_size, pass_bytes)
    return cpu_budget(host_memory(), ranks_on_host)


def most_tokens(config: DflashRayConfig, max_model_len: int) -> int | None:
    """What all sequences at a time can fill on a CPU, whose memory others want; None on a GPU, where more is cache."""
    return config.router.max_running * max_model_len if config.target.device == "cpu" else None


def check_tokens(tokens: int, budget: Budget, row_bytes: int) -> None:
    """Raises ValueError when there is no room for a cache."""
    if tokens < _FEWEST_TOKENS:
        raise ValueError(
            f"target.kv_cache_tokens: auto finds room for {tokens} tokens of {row_bytes} bytes, and {_FEWEST_TOKENS} "
            f"are the least: {budget.arithmetic}; free memory, or raise target.tp_size"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
