"""Log-probabilities are log-softmax over the whole vocabulary, on any number of ranks."""

import pytest
import torch

from dflash_ray.sampling.logprobs import token_logprobs
from tests.shards import run_sharded

NUM_ROWS, VOCAB = 9, 50


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_top", [0, 4])
def test_tokens_and_the_likeliest_in_their_places(size, num_top):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(NUM_ROWS, VOCAB, generator=generator) * 5
    tokens = torch.randint(VOCAB, (NUM_ROWS,), generator=generator).tolist()
    per_rank = -(-VOCAB // size)

    def rank(index, group):
        start = index * per_rank
        return token_logprobs(logits[:, start : start + per_rank].contiguous(), start, tokens, num_top, group)

    results = run_sharded(size, rank)
    expected = logits.double().log_softmax(-1)
    best, ids = expected.topk(num_top)
    for result in results:
        assert result == results[0]
        assert result.chosen == pytest.approx(expected[torch.arange(NUM_ROWS), tokens].tolist(), abs=1e-5)
        assert result.top_ids == ids.tolist()
        assert result.top_logprobs == [pytest.approx(row, abs=1e-5) for row in best.tolist()]
    part = results[0].part(2, 5, 2)
    assert part.chosen == results[0].chosen[2:5] and part.top_ids == [row[:2] for row in ids[2:5].tolist()]
