"""A rank's pass equals transformers, however rows are cut into steps and wherever their pages lie."""

import numpy as np
import pytest
import torch

from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.model import RankModel
from tests.tiny import save_tiny_target
from tests.unit.target_group.conftest import CONFIG

PAGE = CONFIG.target.page_size


def batch(entries: list[tuple[list[int], int, list[int]]]) -> StepBatch:
    """Entries (token ids, context length, pages); all rows are sampled and tapped."""
    columns = {name: [] for name in StepBatch.__slots__}
    for ids, context_len, pages in entries:
        positions = range(context_len, context_len + len(ids))
        columns["token_ids"] += ids
        columns["positions"] += positions
        columns["slots"] += [pages[at // PAGE] * PAGE + at % PAGE for at in positions]
        columns["entry_lens"].append(len(ids))
        columns["context_lens"].append(context_len)
        columns["page_counts"].append(len(pages))
        columns["pages"] += pages
    columns["sample_rows"] = columns["feature_rows"] = list(range(len(columns["token_ids"])))
    return StepBatch(**{name: np.array(values, dtype=np.int64) for name, values in columns.items()})


def logits(model: RankModel, *entries: tuple[list[int], int, list[int]]) -> torch.Tensor:
    return model.rank_logits(model.forward(batch(list(entries))).sampled)


@pytest.fixture
def tokens() -> list[int]:
    return torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def expected(tiny_target, tokens) -> torch.Tensor:
    with torch.inference_mode():
        return tiny_target.load_model()(torch.tensor([tokens])).logits[0]


def test_prefill_chunks_blocks_and_single_rows_equal_transformers(rank_model, tokens, expected):
    pages = list(range(10))
    got = [logits(rank_model, (tokens[a:b], a, pages)) for a, b in ((0, 13), (13, 30), (30, 38), (38, 39), (39, 40))]
    assert torch.allclose(torch.cat(got), expected, atol=1e-4)


def test_scattered_pages_equal_contiguous_ones(rank_model, tokens, expected):
    pages = [37, 3, 200, 11, 90, 4, 55, 56, 1, 0]
    got = torch.cat([logits(rank_model, (tokens[a:b], a, pages)) for a, b in ((0, 20), (20, 40))])
    assert torch.allclose(got, expected, atol=1e-4)


def test_neighbours_in_a_ragged_batch_do_not_see_each_other(rank_model, tokens, expected):
    first, second = list(range(10)), list(range(20, 30))
    logits(rank_model, (tokens[:20], 0, first), (tokens[:7], 0, second))
    got = logits(rank_model, (tokens[20:25], 20, first), (tokens[7:8], 7, second))
    assert torch.allclose(got, torch.cat([expected[20:25], expected[7:8]]), atol=1e-4)


def test_rolled_back_rows_are_overwritten(rank_model, tokens, expected):
    pages = list(range(10))
    logits(rank_model, (tokens[:20], 0, pages))
    logits(rank_model, ([5, 6, 7, 8], 20, pages))
    got = logits(rank_model, (tokens[20:30], 20, pages))
    assert torch.allclose(got, expected[20:30], atol=1e-4)


def test_a_row_is_the_same_bit_for_bit_in_any_step(rank_model, tokens):
    pages, others = list(range(10)), list(range(20, 30))
    logits(rank_model, (tokens[:20], 0, pages), (tokens[:9], 0, others))
    one_by_one = torch.cat([logits(rank_model, (tokens[at : at + 1], at, pages)) for at in range(20, 28)])
    as_block = logits(
        rank_model, (tokens[9:14], 9, others), (tokens[20:28], 20, pages), (tokens[:17], 0, [40, 41, 42, 43, 44])
    )
    assert torch.equal(one_by_one, as_block[5:13])


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma", "gemma2", "granite", "cohere", "cohere2"])
def test_other_families_load_by_the_same_path(process_group, tmp_path, tokens, family):
    target = resolve_target(str(save_tiny_target(family, tmp_path)))
    with torch.inference_mode():
        expected = target.load_model()(torch.tensor([tokens])).logits[0]
    model, pages = RankModel(target, CONFIG, 0, 1), list(range(10))
    got = [logits(model, (tokens[a:b], a, pages)) for a, b in ((0, 13), (13, 38), (38, 39), (39, 40))]
    assert torch.allclose(torch.cat(got), expected, atol=1e-4)


def test_the_context_of_a_target_counts_its_rope_scaling(process_group, tmp_path):
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    target = resolve_target(str(save_tiny_target("llama", tmp_path, max_position_embeddings=64, rope_parameters=rope)))
    assert RankModel(target, CONFIG, 0, 1).max_model_len == 128
