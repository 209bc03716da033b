"""Prompts whose features are several times the largest message: target, router and drafters over gRPC, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from dflash_ray.config import DflashRayConfig, load_config
from dflash_ray.core.errors import RequestError
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.servicer import DrafterServicer
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.drafter_config import parse_dflash_config
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.observability.metrics import DrafterMetrics, RouterMetrics, TargetMetrics
from dflash_ray.pb import common_pb2, drafter_pb2_grpc, router_pb2
from dflash_ray.router.actions import Emit
from dflash_ray.router.pipeline import Pipeline
from dflash_ray.rpc.channel import RunningServer, new_server, start_server
from dflash_ray.rpc.directory import Entry
from dflash_ray.rpc.target_service import add_target_service
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.feature_streams import FeatureStreams
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.servicer import TargetInfo, TargetServicer
from dflash_ray.target_group.tensor_parallel import create_store, init_process_group
from tests.drafter.published import changed, random_weights
from tests.tiny import save_tiny_target

HIDDEN, PROMPT_LEN, NUM_NEW = 768, 1600, 100
LIMIT = 1024 * 1024
SETTINGS = (
    f"network.max_message_bytes={LIMIT}",
    "model.max_model_len=2048",
    "target.kv_cache_tokens=6144",
    "router.draft_timeout_ms=30000",
    "router.policy=fixed",
    "router.prefer_ngram=false",
    "drafter.num_replicas=2",
)
PROMPTS = torch.randint(0, 90, (2, PROMPT_LEN), generator=torch.Generator().manual_seed(3)).tolist()


@dataclass(frozen=True)
class Models:
    target: TargetCheckpoint
    drafter: DrafterCheckpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    target = resolve_target(str(save_tiny_target("llama", tmp_path_factory.mktemp("target"), **sizes)))
    values = changed(hidden_size=HIDDEN, num_target_layers=2, dflash_config={"target_layer_ids": [0, 1]})
    return Models(target, DrafterCheckpoint(parse_dflash_config(values, "test"), random_weights(values), "test"))


@pytest.fixture(scope="module", autouse=True)
def process_group():
    is_ours = not torch.distributed.is_initialized()
    if is_ours:
        init_process_group(create_store("127.0.0.1", 1, 60), 0, 1, "cpu", True, 0)
    yield
    if is_ours:
        torch.distributed.destroy_process_group()


def target_servicer(models: Models, config: DflashRayConfig) -> TargetServicer:
    drafter = models.drafter
    rank = RankModel(models.target, config, 0, 1, drafter.build_projector(), drafter.config.target_layer_ids)
    sizes = {"page_size": config.target.page_size, "num_pages": config.target.num_pages}
    limits = {"max_model_len": rank.max_model_len, "vocab_size": rank.vocab_size}
    store = FeatureStore(config.target.kv_cache_rows, HIDDEN, torch.float32)
    engine = Engine(GroupRunner(rank, SingleRank()), **sizes, max_model_len=rank.max_model_len, features=store)
    features = FeatureStreams(engine.read_features, store.rows_per_piece, "t", drafter.fingerprint)
    info = TargetInfo(
        target_id="t",
        model_fingerprint=models.target.fingerprint,
        feature_fingerprint=drafter.fingerprint,
        hidden_size=rank.hidden_size,
        max_batch_tokens=config.target.max_batch_tokens,
        tp_size=1,
        colocated_draft_tokens=0,
        **sizes,
        **limits,
    )
    return TargetServicer(engine, info, ThreadPoolExecutor(1), Watchdog(600, "a pass"), TargetMetrics("m"), features)


@dataclass
class Running:
    pipeline: Pipeline
    drafters: list[RunningServer]


@contextlib.asynccontextmanager
async def running(models: Models, *settings: str, names: str = "ab", room: int | None = None) -> AsyncIterator[Running]:
    """One target and drafters with room for so many rows behind a pipeline of the router."""
    config = load_config(None, [*SETTINGS, *settings])
    async with contextlib.AsyncExitStack() as closing:

        async def serve(add, servicer) -> RunningServer:
            server = new_server(config.network.max_message_bytes)
            add(servicer, server)
            started = await start_server(server, [], "127.0.0.1", 0)
            closing.push_async_callback(started.stop)
            return started

        target = await serve(add_target_service, target_servicer(models, config))
        drafters = []
        for name in names:
            method = BlockDrafter(models.drafter, models.target)
            watchdog = Watchdog(600, "a draft pass")
            rows = room or config.drafter_context_tokens
            servicer = DrafterServicer(name, method, rows, LIMIT, watchdog, DrafterMetrics())
            closing.push_async_callback(servicer.close)
            drafters.append(await serve(drafter_pb2_grpc.add_DrafterServicer_to_server, servicer))
        pipeline = Pipeline(config, "r", RouterMetrics())
        closing.push_async_callback(pipeline.close)
        await pipeline.connect_target(Entry("target", "t", f"127.0.0.1:{target.port}", {}), epoch=1)
        for name, server in zip(names, drafters, strict=True):
            await pipeline.connect_drafter(Entry("drafter", name, f"127.0.0.1:{server.port}", {}))
        yield Running(pipeline, drafters)


class Listener:
    """Keeps what a pipeline says of its only request."""

    def __init__(self) -> None:
        self.number = id(self)
        self.said: asyncio.Queue[Emit | RequestError] = asyncio.Queue()
        self.emit = self.said.put_nowait

    def fail(self, call_id: int, error: RequestError) -> None:
        self.said.put_nowait(error)


async def generate(pipeline: Pipeline, prompt: list[int], at_token=None) -> list[int]:
    """New tokens; `at_token` is awaited with the number of tokens after each chunk."""
    request = router_pb2.GenerateTokensRequest(
        token_ids=prompt,
        prompt_len=len(prompt),
        sampling=common_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, temperature=0.8, seed=5),
        stopping=common_pb2.StoppingParams(max_new_tokens=NUM_NEW),
    )
    tokens = []
    listener = Listener()
    sequence = pipeline.start(request, listener, 1)
    try:
        while True:
            emit = await listener.said.get()
            if isinstance(emit, RequestError):
                raise emit
            tokens += emit.token_ids.tolist()
            if at_token is not None:
                await at_token(len(tokens))
            if emit.finish_reasons.any():
                return tokens
    finally:
        pipeline.cancel(sequence)


@pytest.fixture(scope="module")
def truth(models) -> list[list[int]]:
    """What plain decoding says."""

    async def decode() -> list[list[int]]:
        async with running(models, "router.policy=off") as app:
            return [await generate(app.pipeline, prompt) for prompt in PROMPTS]

    return asyncio.run(decode())


async def test_features_of_long_prompts_reach_their_drafters_without_a_replay(models, truth):
    assert PROMPT_LEN * HIDDEN * 4 > 4 * LIMIT
    async with running(models) as app:
        assert await asyncio.gather(*(generate(app.pipeline, prompt) for prompt in PROMPTS)) == truth
        scheduler = app.pipeline.scheduler
        assert scheduler.num_drafts_by_source["remote"] >= 2 * (NUM_NEW // 5)
        assert scheduler.num_drafts_by_source["plain"] <= 2, "only the last token within the limit needs no draft"
        assert scheduler.drafting.num_replays == 0 and not scheduler.drafting.num_dropped
        assert app.pipeline.target_id == "t" and app.pipeline.knows_drafter("a") and app.pipeline.knows_drafter("b")


async def test_a_long_context_moves_to_another_drafter_by_replay(models, truth):
    async with running(models, "router.draft_tokens=1") as app:
        pipeline = app.pipeline

        async def lose_a_drafter(num_tokens: int) -> None:
            if num_tokens == 3:
                (holder,) = [s.context.drafter_id for s in pipeline.scheduler._table.sequences if s is not None]
                await app.drafters["ab".index(holder)].stop()

        assert await generate(pipeline, PROMPTS[0], lose_a_drafter) == truth[0]
        assert pipeline.scheduler.drafting.num_replays == 1
        assert pipeline.scheduler.num_drafts_by_source["remote"] > NUM_NEW // 2
        assert pipeline.target_id == "t" and [pipeline.knows_drafter(name) for name in "ab"].count(True) == 1


async def test_a_drafter_without_room_for_all_keeps_those_it_has_and_the_others_go_without(models, truth):
    async with running(models, names="a", room=PROMPT_LEN + NUM_NEW) as app:
        assert await asyncio.gather(*(generate(app.pipeline, prompt) for prompt in PROMPTS)) == truth
        scheduler = app.pipeline.scheduler
        assert scheduler.drafting.num_dropped["refused"] >= 1
        assert scheduler.num_drafts_by_source["remote"] >= NUM_NEW // 5
        assert app.pipeline.target_id == "t" and app.pipeline.knows_drafter("a")


async def test_drafters_that_cannot_reach_the_target_cost_their_drafts_and_nothing_else(models, truth):
    async with running(models) as app:
        scheduler = app.pipeline.scheduler
        scheduler.limits = replace(scheduler.limits, address="127.0.0.1:1")  # nobody listens there
        assert await asyncio.gather(*(generate(app.pipeline, prompt) for prompt in PROMPTS)) == truth
        assert not scheduler.num_drafts_by_source["remote"] and scheduler.num_drafts_by_source["plain"]
        assert scheduler.drafting.num_dropped["cut_off"] >= 2 and not scheduler.drafting.num_dropped["timeout"]
        assert app.pipeline.knows_drafter("a") and app.pipeline.knows_drafter("b")
