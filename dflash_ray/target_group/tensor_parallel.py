"""The ranks of a group: process group, sharding by DeepSpeed AutoTP.

DeepSpeed shards the base model only. Its own head layer all-reduces full logits, so the head is split by vocabulary in
model.py instead.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta

import torch
from torch import distributed

logger = logging.getLogger(__name__)

IDLE_TIMEOUT = timedelta(days=365)  # ranks wait for the next step as long as there is none


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
    distributed.init_process_group(backend, store=store, rank=rank, world_size=tp_size, timeout=IDLE_TIMEOUT)
    import deepspeed

    if not share_host or tp_size == 1:
        # The attribute access `deepspeed.comm.torch` would yield the torch package itself.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def split_over_ranks(base_model: torch.nn.Module, tp_size: int, dtype: torch.dtype) -> torch.nn.Module:
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
