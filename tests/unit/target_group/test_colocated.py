"""A drafter inside the target can be slow, full or broken: no token changes and no step ends."""

from __future__ import annotations

import pytest
import torch

from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.drafter_config import parse_dflash_config
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.colocated import ColocatedDrafter
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from tests.drafter.published import changed, random_weights
from tests.own_drafter import run_ahead
from tests.steps import PROMPT, opening, step_of, tokens_of, verify_step
from tests.unit.target_group.conftest import CONFIG
from tests.unit.target_group.test_engine import OK

NUM_NEW = 24


class Breakable(BlockDrafter):
    """Raises in the methods named, from the `after`-th call of each on."""

    def __init__(self, *args, breaks: tuple[str, ...] = (), after: int = 0, fault=RuntimeError) -> None:
        super().__init__(*args)
        self.breaks, self.fault = breaks, fault
        self.left = dict.fromkeys(breaks, after)
        self.num_failed = 0

    def _call(self, name: str, *args):
        if name in self.breaks:
            self.left[name] -= 1
            if self.left[name] < 0:
                self.num_failed += 1
                raise self.fault(f"{name} is broken")
        return getattr(super(), name)(*args)

    def open(self, *args):
        return self._call("open", *args)

    def close(self, *args):
        return self._call("close", *args)

    def extend(self, *args):
        return self._call("extend", *args)

    def propose(self, *args):
        return self._call("propose", *args)


@pytest.fixture
def build(process_group, tiny_target):
    """An engine of the real model with a colocated drafter that breaks as told."""
    values = changed(dflash_config={"target_layer_ids": [0, 2]}, num_target_layers=4)
    checkpoint = DrafterCheckpoint(parse_dflash_config(values, "test"), random_weights(values), "test")
    rank = RankModel(tiny_target, CONFIG, 0, 1, checkpoint.build_projector(), checkpoint.config.target_layer_ids)
    runner = GroupRunner(rank, SingleRank())

    def new(
        max_context_tokens: int = CONFIG.drafter_context_tokens,
        raises: bool = False,
        caches_prefixes: bool = False,
        **breaks,
    ):
        method = Breakable(checkpoint, tiny_target, **breaks)
        drafter = ColocatedDrafter(method, max_context_tokens, raises)
        store = FeatureStore(CONFIG.target.kv_cache_rows, checkpoint.config.hidden_size, torch.float32)
        sizes = (CONFIG.target.num_pages, CONFIG.target.page_size, 256)
        features = store if caches_prefixes else None
        engine = Engine(runner, *sizes, drafter, features, caches_prefixes=caches_prefixes)
        return engine, drafter, method

    return new


def generate(engine: Engine, ids: tuple[int, ...] = (1, 2)) -> tuple[dict[int, list[int]], dict[int, int]]:
    """All sequences to their ends with whatever is drafted; returns new tokens and how many drafts each got."""
    tokens = {at: [*PROMPT, at] for at in ids}
    num_drafts = dict.fromkeys(ids, 0)
    opened = [opening(at, tokens[at], max_new=NUM_NEW, temperature=0.8, wants_features=True) for at in ids]
    drafting = dict.fromkeys(ids, 4)
    step = step_of(opened, {at: len(tokens[at]) for at in ids}, draft=drafting)
    running = list(ids)
    while running:
        output = engine.step(step)
        assert output.features is None and set(output.statuses.tolist()) == {OK}
        for at, new in tokens_of(output).items():
            tokens[at] += new
        for at, finish in zip(output.sequence_ids.tolist(), output.finishes.tolist(), strict=True):
            if finish:
                running.remove(at)
        drafts = {at: [] for at in running}
        for block in output.colocated_drafts:
            num_drafts[block.sequence_id] += 1
            if block.sequence_id in drafts:
                left = len(PROMPT) + 1 + NUM_NEW - len(tokens[block.sequence_id]) - 1
                drafts[block.sequence_id] = block.draft_ids[: max(0, left)]
        step = verify_step(tokens, drafts, draft=dict.fromkeys(running, 4))
    engine.close(ids)
    engine.allocator.check_integrity()
    assert engine.allocator.num_free == engine.allocator.num_pages
    return {at: known[len(PROMPT) + 1 :] for at, known in tokens.items()}, num_drafts


@pytest.fixture
def truth(build):
    engine, drafter, _ = build()
    tokens, num_drafts = generate(engine)
    assert all(num_drafts.values()) and len(drafter) == 0
    return tokens


@pytest.mark.parametrize(
    "breaks",
    [
        {"breaks": ("propose",)},
        {"breaks": ("propose",), "after": 3},
        {"breaks": ("extend",)},
        {"breaks": ("extend",), "after": 5},
        {"breaks": ("open",)},
        {"breaks": ("close",)},
        {"breaks": ("extend", "close"), "after": 2},
        {"breaks": ("open", "extend", "propose", "close")},
        {"breaks": ("extend",), "after": 4, "fault": torch.OutOfMemoryError},
        {"breaks": ("propose",), "after": 2, "fault": torch.OutOfMemoryError},
    ],
    ids=lambda breaks: "{breaks} after {after} {fault}".format(**{"after": 0, "fault": ""} | breaks),
)
def test_a_drafter_that_fails_changes_no_token_and_ends_no_step(build, truth, breaks):
    engine, drafter, method = build(**breaks)
    for _ in range(2):
        assert generate(engine)[0] == truth
    assert method.num_failed and len(drafter) == 0


def test_a_session_lost_to_a_fault_is_not_drafted_for_and_the_next_sequence_is(build, truth):
    engine, _, method = build(breaks=("propose",), after=2)
    assert generate(engine)[1] == {1: 2, 2: 2}
    method.breaks = ()
    tokens, num_drafts = generate(engine)
    assert tokens == truth and min(num_drafts.values()) > 2


def test_a_fault_ends_a_job_that_measures_drafts(build):
    engine, _, _ = build(raises=True, breaks=("propose",))
    with pytest.raises(RuntimeError, match="propose is broken"):
        generate(engine)


def test_a_sequence_without_room_at_the_drafter_is_decoded_plainly_and_its_neighbour_keeps_its_drafts(build, truth):
    _, all_drafts = generate(build()[0])
    engine, drafter, _ = build(max_context_tokens=len(PROMPT) + NUM_NEW + 4)
    tokens, num_drafts = generate(engine)
    assert tokens == truth and len(drafter) == 0
    (refused,) = [at for at in num_drafts if num_drafts[at] < all_drafts[at]]
    assert num_drafts[refused] < all_drafts[refused] / 2


def test_where_no_sequence_finds_room_nothing_is_drafted(build, truth):
    engine, _, _ = build(max_context_tokens=len(PROMPT))
    assert generate(engine) == (truth, {1: 0, 2: 0})


def test_a_drafter_with_the_room_that_the_configuration_derives_refuses_nobody(build):
    engine, drafter, _ = build()
    pages = CONFIG.target.num_pages
    length = CONFIG.target.kv_cache_rows // 8
    tokens = PROMPT * (length // len(PROMPT))
    opened = [opening(at, tokens, max_new=2, wants_features=True) for at in range(8)]
    step = step_of(opened, dict.fromkeys(range(8), length))
    engine.step(step)
    assert engine.allocator.num_free < pages // 16 and len(drafter) == 8


def test_a_sequence_whose_rows_were_found_is_drafted_for_as_if_they_had_been_computed(build):
    computed = [generate(build()[0], (at,)) for at in range(1, 9)]
    engine, drafter, _ = build(raises=True, caches_prefixes=True)
    assert [generate(engine, (at,)) for at in range(1, 9)] == computed
    assert engine.prefixes.num_found == 7 * 4 and len(drafter) == 0
    assert all(count for _, num_drafts in computed for count in num_drafts.values())


def test_a_session_lost_to_a_fault_is_not_begun_anew_with_rows_that_are_found(build, truth):
    engine, _, method = build(caches_prefixes=True, breaks=("extend",), after=1)
    for _ in range(3):
        assert {at: generate(engine, (at,))[0][at] for at in truth} == truth
    assert method.num_failed


@pytest.mark.parametrize(
    "breaks", [{}, {"breaks": ("propose",), "after": 3}, {"breaks": ("extend",), "after": 5}], ids=str
)
def test_steps_ahead_give_the_same_tokens_whatever_becomes_of_the_drafter(build, truth, breaks):
    engine, drafter, _ = build(**breaks)
    tokens = {at: [*PROMPT, at] for at in truth}
    opened = [opening(at, tokens[at], max_new=NUM_NEW, temperature=0.8, wants_features=True) for at in truth]
    assert run_ahead(engine, opened)[0] == truth and len(drafter) == 0
