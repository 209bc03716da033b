"""The ranks of a group: process group, sharding by DeepSpeed AutoTP.

DeepSpeed shards the base model only. Its own head layer all-reduces full logits, so the head is split by vocabulary in
model.py instead.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

logger = logging.getLogger(__name__)

_SPLIT_DIMS = {"LinearLayer": 0, "LinearAllreduce": 1}  # of the weights of DeepSpeed's layers
IDLE_TIMEOUT = timedelta(days=365)  # ranks wait for the next step as long as there is none


def create_store(host: str, tp_size: int, timeout_s: float) -> distributed.TCPStore:
    """Rank 0's rendezvous on a free port of `host`, which stays bound: nobody can take it in between.

    The socket is ours, as the store's own would listen on all interfaces.
    """
    listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    return distributed.TCPStore(
        host,
        listening.getsockname()[1],
        tp_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
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


def smallest_over_ranks(value: int, tp_size: int, device: str) -> int:
    """The least of all ranks' values, the same on all ranks."""
    if tp_size == 1:
        return value
    smallest = torch.tensor([value], dtype=torch.int64, device=device)
    distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
    return int(smallest)


def split_over_ranks(base_model: torch.nn.Module, tp_size: int, dtype: torch.dtype) -> torch.nn.Module:
    """The base model with its linear layers sharded in place over the process group; as it is for one rank.

    A model whose parameters are on the meta device comes back with parameters of this rank's shapes, without values, on
    the rank's device.
    """
    if tp_size == 1:
        return base_model
    import deepspeed

    with kept_buffers(base_model):
        engine = deepspeed.init_inference(
            base_model,
            dtype=dtype,
            tensor_parallel={"tp_size": tp_size},
            replace_with_kernel_inject=False,
        )
    module: torch.nn.Module = engine.module
    del engine
    gc.collect()  # what DeepSpeed leaves behind holds layers in circles, which would outlive their packing
    return module


@contextmanager
def kept_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Puts back what buffers are inside: rotary frequencies, which DeepSpeed would round to the model's dtype."""
    buffers = [(part, name, buffer) for part in model.modules() for name, buffer in part._buffers.items()]
    yield
    for part, name, buffer in buffers:
        part._buffers[name] = buffer


def is_split_plainly(layer: Any) -> bool:
    """Whether each rank has one range of rows or columns of a layer, or all of it: fused layers interleave."""
    return not hasattr(layer, "tp_index") or type(layer).__name__ in _SPLIT_DIMS


def own_part(layer: Any, parameter: str) -> tuple[int, int]:
    """Where this rank's part of a layer's weight or bias begins in the whole one: dimension and first index."""
    dim = _SPLIT_DIMS.get(type(layer).__name__)
    if dim is None or (dim == 1 and parameter == "bias"):  # which is added to the sum over the ranks
        return 0, 0
    sizes: tuple[int, ...] = layer._partition_sizes
    return dim, sum(sizes[: layer.tp_index])
