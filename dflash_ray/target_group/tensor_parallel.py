"""The ranks of a group: process group, sharding by DeepSpeed AutoTP, broadcast of steps.

DeepSpeed shards the base model only. Its own head layer all-reduces full logits, so the head is split by vocabulary in
model.py instead.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

logger = logging.getLogger(__name__)

_IDLE_TIMEOUT = timedelta(days=365)  # ranks wait for the next step as long as there is none


def create_store(host: str, tp_size: int, timeout_s: float) -> distributed.TCPStore:
    """Rank 0's rendezvous on a free port of `host`, which stays bound: nobody can take it in between."""
    return distributed.TCPStore(
        host, 0, tp_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


def join_store(host: str, port: int, tp_size: int, timeout_s: float) -> distributed.TCPStore:
    """Another rank's connection to the rendezvous."""
    return distributed.TCPStore(host, port, tp_size, is_master=False, timeout=timedelta(seconds=timeout_s))


def init_process_group(
    store: distributed.TCPStore, rank: int, tp_size: int, device: str, share_host: bool, local_rank: int
) -> None:
    """Joins the ranks into torch's default group and sets what DeepSpeed reads from the environment.

    Args:
        share_host: all ranks run on one host, so that DeepSpeed may reduce through shared memory on CPU.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(tp_size),
        LOCAL_RANK=str(local_rank),
        # DeepSpeed's shared-memory reduction crashes unless it believes that all ranks are local.
        LOCAL_SIZE=str(tp_size),
        DS_ACCELERATOR="cpu" if device == "cpu" else "cuda",
    )
    backend = "gloo" if device == "cpu" else "nccl"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=tp_size, timeout=_IDLE_TIMEOUT)
    import deepspeed

    if not share_host or tp_size == 1:
        # The attribute access `deepspeed.comm.torch` would yield the torch package itself.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def shard(base_model: torch.nn.Module, tp_size: int, dtype: torch.dtype) -> torch.nn.Module:
    """The base model with its linear layers sharded in place over the process group; as it is for one rank."""
    if tp_size == 1:
        return base_model
    import deepspeed

    engine = deepspeed.init_inference(
        base_model,
        dtype=dtype,
        tensor_parallel={"tp_size": tp_size},
        replace_with_kernel_inject=False,
    )
    module: torch.nn.Module = engine.module
    return module


class StepChannel:
    """Broadcast of flat int64 arrays from rank 0 over the group's own connection."""

    def __init__(self, device: str) -> None:
        self._device = device

    def send(self, *arrays: NDArray[np.int64]) -> None:
        """Rank 0: gives every other rank the arrays."""
        header = torch.tensor([len(arrays[0]), len(arrays[1])], device=self._device)
        distributed.broadcast(header, src=0)
        distributed.broadcast(torch.from_numpy(np.concatenate(arrays)).to(self._device), src=0)

    def receive(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Other ranks: blocks until rank 0 sends two arrays."""
        header = torch.zeros(2, dtype=torch.int64, device=self._device)
        distributed.broadcast(header, src=0)
        first, second = header.tolist()
        flat = torch.zeros(first + second, dtype=torch.int64, device=self._device)
        distributed.broadcast(flat, src=0)
        values: Any = flat.cpu().numpy()
        return values[:first], values[first:]
