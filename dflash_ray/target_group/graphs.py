"""Functions over fixed buffers that are launched in every step: as CUDA graphs on a GPU, called elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)
_WARM_UPS = 2  # libraries make their workspaces and choose their kernels in a first call


class Graphs:
    """What was captured, by key. All graphs share one pool of memory: they run one after the other.

    A function must read and write memory that stays where it is, launch the same whatever is in it, and not wait for
    the device. What it returns means nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._graphs)

    @torch.inference_mode()
    def capture(self, functions: dict[Hashable, Callable[[], None]], what: str) -> None:
        """Captures functions; on a CPU there is nothing to do. Collective where they are."""
        if self._device.type != "cuda":
            return
        began, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
        for number, (key, run) in enumerate(functions.items(), 1):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, of the server and of NCCL, may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
            self._graphs[key] = graph
            logger.info("captured %s %s, %d of %d", what, key, number, len(functions))
        torch.cuda.synchronize()
        gib = (free - torch.cuda.mem_get_info()[0]) / 2**30
        seconds = time.perf_counter() - began
        logger.info("%d graphs of %s took %.1f s and %.2f GiB", len(functions), what, seconds, gib)

    def launch(self, key: Hashable, run: Callable[[], None]) -> None:
        """Launches a function: its graph, or itself where it was not captured."""
        graph = self._graphs.get(key)
        if graph is None:
            run()
        else:
            graph.replay()
