"""Two ranks in processes of their own, led through the same steps: equal tables, and the tokens of one rank alone."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch

from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.sampling.parameters import REJECTION
from dflash_ray.sampling.ranks import ProcessGroupRanks
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.fixed_passes import FixedPasses
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.step import StepInput
from dflash_ray.target_group.step_channel import StepChannel
from dflash_ray.target_group.step_message import pack_step, unpack_step
from dflash_ray.target_group.tensor_parallel import create_store, init_process_group, join_store
from tests.own_drafter import Guessing, run_ahead
from tests.steps import PROMPT, garbage, opening, plain, run, step_of, verify_step
from tests.trees import random_trees
from tests.unit.target_group.conftest import CONFIG
from tests.unit.target_group.test_engine import PENALISED
from tests.unit.target_group.test_prefix_cache import caching_engine

SIZE = 2
LAST = 2**64 - 1  # a sequence whose closing ends the test
DRAFTED: dict[int, list[int]] = {}  # texts that the drafter on the rank that leads knows
SAMPLINGS = ({}, PENALISED | {"top_p": 0.8}, {"temperature": 0.9, "bias_ids": [4], "bias_values": [2.5], "min_p": 0.01})


def with_drafter() -> dict[str, Any]:
    """Arguments of the engine that leads: it alone has a drafter, much of whose drafts is right."""
    return {
        "drafter": Guessing(DRAFTED, rate=0.9),
        "features": FeatureStore(CONFIG.target.kv_cache_rows, 16, torch.float32),
    }


def drive(engine: Engine) -> list[list[int]]:
    """Some sequences to their ends, with and without drafts, and some that stay open."""
    texts = [run(engine, opening(**sampling), draft_of) for sampling in SAMPLINGS for draft_of in (plain, garbage)]
    trees = [random_trees(text, len(PROMPT)) for text in texts[::2]]
    assert [run(engine, opening(**one), tree) for one, tree in zip(SAMPLINGS, trees, strict=True)] == texts[::2]
    drafted = [opening(20, PROMPT, max_new=14), opening(21, PROMPT, max_new=12, temperature=0.9)]
    texts += [run(engine, one, plain) for one in drafted]
    DRAFTED.update({one.sequence_id: [*PROMPT, *text] for one, text in zip(drafted, texts[-2:], strict=True)})
    for tree_width in (1, 2):
        got, num_accepted = run_ahead(engine, drafted, tree_width=tree_width)
        assert list(got.values()) == texts[-2:] and num_accepted > 5
    long = (PROMPT * 30)[:200]
    engine.step(step_of([opening(2, long), opening(3, **PENALISED), opening(4, [96])], {2: 90, 3: 7, 4: 1}))
    engine.close([2])
    output = engine.step(step_of([opening(5, long), opening(6, num_logprobs=2, num_prompt_logprobs=1)], {5: 200, 6: 7}))
    texts.append(output.token_ids.tolist())
    engine.step(verify_step({5: long, 6: [*PROMPT, 0], 7: []}, {6: [96], 7: [], 5: [1, 2]}))
    sharing = [opening(10, [*long, *texts[0]], cache_salt=b"a"), opening(11, [*long, *texts[0]], cache_salt=b"a")]
    sharing.append(opening(12, [*long, *texts[0]]))  # finds what 2 and 5 have computed
    output = engine.step(step_of(sharing, {10: 100, 11: 100, 12: 100}))
    assert output.kv_lens.tolist() == [100, 0, 240] and output.cached_lens.tolist() == [0, 0, 200]
    texts.append(output.token_ids.tolist())
    engine.close([12])
    output = engine.step(step_of(prefill={10: 140, 11: 140}))
    assert output.cached_lens.tolist() == [0, 100]
    output = engine.step(step_of(prefill={11: 140}))
    assert output.cached_lens.tolist() == [236]
    engine.close([LAST])
    engine.step(step_of())
    return texts


def state(engine: Engine) -> dict[int, list]:
    """All that a rank knows of its open sequences, and how many pages are free."""
    table = engine._table
    known = {}
    for sequence_id, slot in table.slot_of.items():
        length, num_pages = int(table.committed_lens[slot]), int(table.page_counts[slot])
        known[sequence_id] = [
            int(table.kv_lens[slot]), table.tokens[slot, :length].tolist(), table.pages[slot, :num_pages].tolist(),
            table.sampling.ints[slot].tolist(), table.sampling.floats[slot].tolist(), table.sampling.ids[slot].tolist(),
            table.sampling.values[slot].tolist(),
        ]  # fmt: skip
    prefixes = engine.prefixes
    cache = [prefixes._name_of, prefixes._has_features.tolist(), list(engine.allocator._kept)]
    return known | {-1: [engine.allocator.num_free, *cache]}


def run_rank(rank: int, port: int, path: str, has_fixed_passes: bool, results) -> None:
    torch.set_num_threads(1)
    init_process_group(join_store("127.0.0.1", port, SIZE, 60), rank, SIZE, "cpu", False, rank)
    channel = StepChannel()
    model = RankModel(resolve_target(path), CONFIG, rank, SIZE, runs_as_device=has_fixed_passes)
    ranks = ProcessGroupRanks(None, SIZE)
    runner = FixedPasses(model, ranks, "cpu", (16,), True) if has_fixed_passes else GroupRunner(model, ranks)
    engine = Engine(
        runner,
        CONFIG.target.num_pages,
        CONFIG.target.page_size,
        256,
        lead=channel if rank == 0 else None,
        caches_prefixes=True,
        **(with_drafter() if rank == 0 else {}),
    )
    texts = drive(engine) if rank == 0 else None
    while rank:
        step = channel.receive()
        engine.step(step)
        if LAST in step.close:
            break
    results.put((rank, texts, state(engine)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("has_fixed_passes", [False, True], ids=["as it is", "fixed passes"])
@pytest.mark.timeout(240)
def test_ranks_that_are_led_through_the_same_steps_have_equal_tables_and_one_ranks_tokens(
    runner, tiny_target, has_fixed_passes
):
    context = multiprocessing.get_context("spawn")
    store, results = create_store("127.0.0.1", SIZE, 60), context.Queue()
    path, port = str(tiny_target.path), store.port
    ranks = [
        context.Process(target=run_rank, args=(rank, port, path, has_fixed_passes, results)) for rank in range(SIZE)
    ]
    for process in ranks:
        process.start()
    found = {rank: (texts, known) for rank, texts, known in (results.get(timeout=200) for _ in ranks)}
    for process in ranks:
        process.join(timeout=30)
    alone = caching_engine(runner, **with_drafter())
    assert found[0][0] == drive(alone)
    assert found[0][1] == found[1][1] == state(alone)
    assert set(found[0][1]) == {3, 5, 6, 10, 11, -1}


def everything() -> StepInput:
    """A step with something in every column."""
    openings = [
        opening(LAST, seed=2**64 - 1, bias_ids=[4], bias_values=[0.5], mode=REJECTION, wants_features=True),
        opening(8, tokens=[1, 2], stops=[5], min_new=3, num_logprobs=0, temperature=0.7),
        opening(9, tokens=[96], cache_salt=bytes(range(250, 256)) + b"a"),
    ]
    drawn = {"num_candidates": [2], "candidate_ids": [7, 1], "candidate_probs": [0.25, 0.75]}
    return step_of(openings, {8: 2}, {3: (5, [7])}, close=[1, LAST], **drawn)


def as_values(value):
    """Nested dataclasses as comparable values."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.tolist()
    if isinstance(value, list):
        return [as_values(one) for one in value]
    if hasattr(value, "__slots__"):
        return {name: as_values(getattr(value, name)) for name in value.__slots__}
    return value


@pytest.mark.parametrize("step", [everything(), step_of()], ids=["full", "empty"])
def test_a_step_survives_packing(step):
    got = unpack_step(pack_step(step))
    assert list(got.faults_of_open) == list(step.faults_of_open) and list(got.faults_of_drafts) == []
    got.faults_of_open = step.faults_of_open
    got.drafts.parents = step.drafts.parents  # those of chains, which are all that runs
    assert as_values(got) == as_values(step)
