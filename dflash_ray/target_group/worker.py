"""One tensor-parallel rank. Rank 0 also serves the Target gRPC service and holds the engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import ray
import torch

from dflash_ray.config import DflashRayConfig
from dflash_ray.core.memory import keep_freed_memory, return_freed_memory
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint, resolve_drafter
from dflash_ray.models.feature_pages import FeaturePages
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.observability.logs import configure_logging
from dflash_ray.observability.metrics import TargetMetrics
from dflash_ray.pb import target_pb2
from dflash_ray.rpc.channel import RunningServer, format_address, new_server, start_server
from dflash_ray.rpc.metrics import SERVICE_NAME as METRICS_SERVICE_NAME
from dflash_ray.rpc.metrics import add_metrics_service
from dflash_ray.rpc.node import bind_host, see_own_gpu
from dflash_ray.rpc.target_service import add_target_service
from dflash_ray.sampling.ranks import ProcessGroupRanks, RankGroup, SingleRank
from dflash_ray.target_group.cache_size import (
    check_tokens,
    context_row_bytes,
    most_tokens,
    rank_budget,
    tokens_that_fit,
)
from dflash_ray.target_group.colocated import ColocatedDrafter
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.feature_streams import FeatureStreams, SharedRows
from dflash_ray.target_group.fixed_passes import new_runner
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.pass_memory import draft_pass_bytes, target_pass_bytes
from dflash_ray.target_group.rank import RankPlace, Rendezvous
from dflash_ray.target_group.servicer import TargetInfo, TargetServicer
from dflash_ray.target_group.step_channel import StepChannel, follow
from dflash_ray.target_group.tensor_parallel import (
    create_store,
    init_process_group,
    join_store,
    smallest_over_ranks,
)

logger = logging.getLogger(__name__)
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
_SERVICE_NAME = target_pb2.DESCRIPTOR.services_by_name["Target"].full_name


def model_fingerprint(target: TargetCheckpoint, dtype: str) -> str:
    """Hash of what decides the tokens: weights, configuration and arithmetic. No answer is continued by another."""
    values = {name: value for name, value in target.config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    text = json.dumps([target.fingerprint, dtype, values], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class TargetRank:
    """What a RankActor hosts."""

    def __init__(self, config: DflashRayConfig, target_id: str, place: RankPlace) -> None:
        configure_logging(f"target-{place.rank}", config.observability.log_level, config.observability.log_format)
        self._config = config
        self._target_id = target_id
        self._place = place
        # OpenMP keeps a pool of threads for each calling thread, so loading and all passes come from one.
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pass")
        self._watchdog = Watchdog(config.target.step_timeout_s, f"a pass of rank {place.rank}")
        self._store: torch.distributed.TCPStore | None = None
        self._channel: StepChannel | None = None  # in a group of several
        self._features: FeatureStreams | None = None
        self._server: RunningServer | None = None

    async def rendezvous(self) -> Rendezvous:
        """Rank 0: opens the store on a free port."""
        host = ray.util.get_node_ip_address()
        self._store = create_store(host, self._place.tp_size, self._config.target.init_timeout_s)
        return Rendezvous(host, self._store.port)

    async def load(self, rendezvous: Rendezvous) -> dict[str, object]:
        """Joins the group and loads this rank's part; rank 0 then listens.

        Returns the rank's pid and, from rank 0, the group's address and fingerprints.
        """
        loop = asyncio.get_running_loop()
        info = await loop.run_in_executor(self._compute, self._load, rendezvous)
        return_freed_memory()
        if self._config.uses_features and self._place.rank == 0:
            keep_freed_memory()
        if self._place.rank == 0:
            info["address"] = await self._listen()
        return info

    async def run(self) -> None:
        """Lives as long as the rank does: other ranks follow rank 0, rank 0 waits for the end."""
        if self._place.rank == 0:
            await asyncio.Event().wait()
        assert self._channel is not None
        await asyncio.get_running_loop().run_in_executor(
            self._compute, follow, self._engine, self._channel, self._watchdog
        )

    def _load(self, rendezvous: Rendezvous) -> dict[str, object]:
        config, place = self._config, self._place
        if config.target.device == "cuda":
            see_own_gpu()
        cores = os.cpu_count() or 1
        share = cores // place.tp_size if place.share_host else cores
        torch.set_num_threads(config.target.num_threads or max(1, share))
        device = config.target.device
        if place.tp_size > 1:
            self._join(rendezvous)
        target = resolve_target(config.model.path)
        is_first = place.rank == 0
        drafter = resolve_drafter(config.drafter.path, target) if is_first and config.uses_features else None
        dtype = getattr(torch, config.model.dtype)
        model = RankModel(
            target,
            config,
            place.rank,
            place.tp_size,
            None if drafter is None else drafter.build_projector(dtype).to(device),
            () if drafter is None else drafter.config.target_layer_ids,
        )
        ranks: RankGroup = SingleRank()
        if place.tp_size > 1:
            ranks = ProcessGroupRanks(None, place.tp_size)
            self._channel = StepChannel()
        block_drafter = self._block_drafter(drafter)
        if config.target.kv_cache_tokens == "auto":
            config = self._with_cache_that_fits(model, drafter, has_contexts=block_drafter is not None)
            model.allocate_cache(config.target.num_pages, config.target.page_size)
        colocated = None
        if block_drafter is not None:
            colocated = ColocatedDrafter(block_drafter, config.drafter_context_tokens)
        features = shared = None
        if drafter is not None and (colocated is None or config.target.prefix_cache):
            home, width = "cpu" if colocated is None else device, drafter.config.hidden_size
            if colocated is None and config.network.shared_memory:
                shared = FeaturePages.create(config.target.num_pages, config.target.page_size, width, dtype)
            features = FeatureStore(config.target.kv_cache_rows, width, dtype, home, shared)
        self._engine = Engine(
            new_runner(model, ranks, config, returns_features=drafter is not None and colocated is None),
            config.target.num_pages,
            config.target.page_size,
            model.max_model_len,
            colocated,
            features,
            lead=self._channel if is_first else None,
            caches_prefixes=config.target.prefix_cache,
        )
        if drafter is not None and features is not None and colocated is None:
            self._features = FeatureStreams(
                self._engine.read_features,
                features.rows_per_piece,
                self._target_id,
                drafter.fingerprint,
                None if shared is None else SharedRows(shared.offer, self._engine.name_features),
            )
        if is_first:
            self._info = TargetInfo(
                target_id=self._target_id,
                model_fingerprint=model_fingerprint(target, config.model.dtype),
                feature_fingerprint="" if drafter is None else drafter.fingerprint,
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                max_model_len=model.max_model_len,
                page_size=config.target.page_size,
                num_pages=config.target.num_pages,
                max_batch_tokens=config.target.max_batch_tokens,
                tp_size=place.tp_size,
                colocated_draft_tokens=0 if colocated is None else colocated.max_draft_tokens,
            )
        return {"pid": os.getpid(), "node_id": ray.get_runtime_context().get_node_id()}

    def _join(self, rendezvous: Rendezvous) -> None:
        """Joins the other ranks' process group. One by itself has none: its thread would wake 100 times a second."""
        place, timeout_s = self._place, self._config.target.init_timeout_s
        store = self._store or join_store(rendezvous.host, rendezvous.port, place.tp_size, timeout_s)
        device = self._config.target.device
        init_process_group(store, place.rank, place.tp_size, device, place.share_host, place.local_rank(device))

    def _block_drafter(self, checkpoint: DrafterCheckpoint | None) -> BlockDrafter | None:
        """The drafter inside this rank, if there is one."""
        drafter = self._config.drafter
        if checkpoint is None or drafter.placement_mode != "colocated":
            return None
        target = resolve_target(self._config.model.path)
        return BlockDrafter(checkpoint, target, drafter.device, getattr(torch, drafter.dtype))

    def _with_cache_that_fits(
        self, model: RankModel, drafter: DrafterCheckpoint | None, has_contexts: bool
    ) -> DflashRayConfig:
        """The configuration with a number for `target.kv_cache_tokens`, the same on every rank. Collective."""
        config, place = self._config, self._place
        row_bytes = model.cache_row_bytes
        if drafter is not None and (has_contexts or config.target.device == "cpu"):  # else features lie on the host
            row_bytes += drafter.config.hidden_size * getattr(torch, config.model.dtype).itemsize
        if drafter is not None and has_contexts:
            row_bytes += context_row_bytes(drafter.config, getattr(torch, config.drafter.dtype))
        rank_vocab_size = -(-model.vocab_size // place.tp_size)
        pass_bytes = target_pass_bytes(model, config.target.pass_rows, config.target.page_size, rank_vocab_size)
        if drafter is not None and has_contexts:
            dtype, sequences = getattr(torch, config.drafter.dtype), config.router.max_running
            pass_bytes += draft_pass_bytes(drafter, dtype, model.vocab_size, model.max_model_len, sequences)
        budget = rank_budget(config, rank_vocab_size, place.tp_size if place.share_host else 1, pass_bytes)
        most = most_tokens(config, model.max_model_len)
        own = tokens_that_fit(budget, row_bytes, config.target.page_size, most)
        tokens = smallest_over_ranks(own, place.tp_size, config.target.device)
        check_tokens(tokens, budget, row_bytes)
        logger.info(
            "target.kv_cache_tokens auto: %d tokens (this rank has room for %d of %d bytes: %s)",
            tokens, own, row_bytes, budget.arithmetic,
        )  # fmt: skip
        return config.with_kv_cache_tokens(tokens)

    async def _listen(self) -> str:
        server = new_server(self._config.network.max_message_bytes)
        metrics = TargetMetrics(self._config.model.served_name)
        servicer = TargetServicer(self._engine, self._info, self._compute, self._watchdog, metrics, self._features)
        add_target_service(servicer, server)
        add_metrics_service(server, servicer.render_metrics)
        host = bind_host(self._config.network.bind_host)
        self._server = await start_server(server, [_SERVICE_NAME, METRICS_SERVICE_NAME], host, 0)
        return format_address(host, self._server.port)
