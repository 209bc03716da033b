"""Blocks in passes of fixed numbers, as devices run them, are those of the pass that a CPU makes for each number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.models import block_drafter, context_passes
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_layers import DeviceLayers
from dflash_ray.models.draft_passes import DraftPasses, num_bytes
from dflash_ray.models.drafter_checkpoint import load_drafter
from tests.drafter.published import HIDDEN, changed, dflash2, save_random


def drafts(drafter: BlockDrafter, lens: list[int], num_candidates: int = 2):
    """Proposals for sessions of contexts of these lengths, all together."""
    for session, length in enumerate(lens):
        features = torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(session))
        drafter.open(session)
        drafter.extend_one(session, 0, features)
    return drafter.propose(list(range(len(lens))), [7] * len(lens), [5] * len(lens), num_candidates)


@pytest.mark.parametrize("values", [changed(), dflash2()], ids=["dflash", "dflash2"])
@pytest.mark.parametrize("lens", [[5], [9, 2, 130], [1 + 7 * n % 60 for n in range(67)]], ids=["1", "3", "67"])
def test_drafts_do_not_depend_on_how_many_blocks_a_pass_has(values, lens, target, tmp_path, monkeypatch):
    path = save_random(tmp_path, values)
    wanted = drafts(BlockDrafter(load_drafter(path, target), target), lens)
    monkeypatch.setattr(block_drafter, "draft_layers", DeviceLayers)
    got = drafts(BlockDrafter(load_drafter(path, target), target), lens)
    np.testing.assert_array_equal(got.candidate_ids, wanted.candidate_ids)
    np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-4)


def test_a_pass_is_of_the_smallest_number_of_blocks_that_hold_it_and_stays_where_it_is(target, tmp_path, monkeypatch):
    monkeypatch.setattr(block_drafter, "draft_layers", DeviceLayers)
    passes = []
    run = DraftPasses._pass

    def counted(self, buffers, reach, pages):
        passes.append((len(buffers.seeds), buffers._chosen.data_ptr(), buffers.slots.data_ptr()))
        run(self, buffers, reach, pages)

    monkeypatch.setattr(DraftPasses, "_pass", counted)
    drafter = BlockDrafter(load_drafter(save_random(tmp_path, changed()), target), target)
    for count in (3, 4, 1, 4, 70):
        drafts(drafter, [6] * count)
    assert [blocks for blocks, *_ in passes] == [4, 4, 1, 4, 64, 8]
    assert passes[0] == passes[1] == passes[3]


@pytest.fixture(scope="module", params=[changed(), dflash2()], ids=["dflash", "dflash2"])
def pair(request, target, tmp_path_factory) -> tuple[BlockDrafter, BlockDrafter]:
    """One drafter in fixed passes, and without them."""
    checkpoint = load_drafter(save_random(tmp_path_factory.mktemp("pair"), request.param), target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_drafter, "draft_layers", DeviceLayers)
        fixed, free = (BlockDrafter(checkpoint, target) for _ in range(2))
    free._passes = free._context_passes = None
    return fixed, free


def row(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


BLOCK_OF_A_BATCH = st.tuples(
    st.integers(0, 9),  # session
    st.integers(1, 40),  # rows that it gets
    st.integers(0, 49),  # anchor
    st.integers(1, 5),  # drafts
    st.builds(Draw, st.sampled_from([0.0, 0.4, 1.0]), st.integers(0, 2**64 - 1), st.booleans()),
)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(BLOCK_OF_A_BATCH, min_size=1, max_size=9, unique_by=lambda one: one[0]), min_size=1, max_size=3),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2]),
)
def test_fixed_passes_extend_and_draft_to_the_bit_as_passes_of_the_batchs_own_size(pair, batches, candidates, width):
    for drafter in pair:
        for session in range(10):
            drafter.open(session)
    for number, batch in enumerate(batches):
        found = []
        for drafter in pair:
            for session, count, *_ in batch:
                drafter.extend_one(session, drafter.context_len(session), row(100 * number + session, count))
            sessions, _, anchors, counts, draws = map(list, zip(*batch, strict=True))
            found.append(drafter.propose(sessions, anchors, counts, candidates, draws, width))
        assert len(found[0]) == len(found[1]) == len(batch)
        for one, other in zip(*found, strict=True):
            assert torch.equal(one.candidate_ids, other.candidate_ids) and torch.equal(one.logprobs, other.logprobs)
            assert one.is_drawn == other.is_drawn
            assert (one.parents is None) == (other.parents is None)
            assert one.parents is None or torch.equal(one.parents, other.parents)


def test_a_context_longer_than_any_pass_is_made_in_several_and_a_closed_sessions_rows_are_left_out(pair, monkeypatch):
    monkeypatch.setattr(context_passes, "ROWS", (16, 64))
    rows, keys = 2 * 64 + 17, []
    for drafter in pair:
        for session in (0, 1, 2):
            drafter.open(session)
            drafter.extend_one(session, 0, row(session, rows if session == 1 else 3))
            if session == 0:
                drafter.close(session)
        drafter.catch_up()
        places = drafter._pages.rows_of(np.array([1, 2]), np.array([0, 0]), np.array([rows, 3]))
        keys.append((drafter._pages.keys[:, places], drafter._pages.values[:, places]))
    assert all(torch.equal(one, other) for one, other in zip(*keys, strict=True))


def test_the_memory_of_passes_is_counted_before_they_are_made(pair):
    drafter = pair[0]
    drafter._passes._buffers.clear()
    for count in (1, 2, 4):
        drafts(drafter, [3] * count, 1)
    made = [one for buffers in drafter._passes._buffers.values() for one in (buffers._memory, buffers._chosen)]
    config, positions, vocab = drafter.config, len(drafter._turns[0]), 1000
    rows, slots = 4 * config.block_size, 4 * (config.block_size - 1)
    sums = rows * config.num_attention_heads * -(-positions // 256) * (config.head_dim + 2) * 4
    counted = num_bytes(config, vocab, positions, 3, torch.float32)
    assert counted == sum(one.nbytes for one in made) + sums + slots * vocab * 8


@pytest.mark.gpu
def test_a_replayed_draft_is_the_draft_as_it_runs_to_the_bit(target, tmp_path, monkeypatch):
    path = save_random(tmp_path, dflash2())
    drafter = BlockDrafter(load_drafter(path, target), target, "cuda", torch.bfloat16)
    lens = [5, 40, 300]
    replayed = drafts(drafter, lens)
    graphs = drafter._passes._graphs
    assert len(graphs._graphs) == 1
    monkeypatch.setattr(graphs, "launch", lambda key, run, pages: run())
    eager = drafts(drafter, lens)
    np.testing.assert_array_equal(replayed.candidate_ids, eager.candidate_ids)
    np.testing.assert_array_equal(replayed.logprobs, eager.logprobs)
