"""Log-probabilities are log-softmax over the whole vocabulary, on any number of ranks."""

import numpy as np
import pytest
import torch

from dflash_ray.sampling.logprobs import Logprobs, token_logprobs
from tests.plans import as_lists
from tests.ranks import run_sharded

NUM_ROWS, VOCAB = 9, 50


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_top", [0, 4])
def test_tokens_and_the_likeliest_in_their_places(size, num_top):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(NUM_ROWS, VOCAB, generator=generator) * 5
    tokens = torch.randint(VOCAB, (NUM_ROWS,), generator=generator).numpy()
    per_rank = -(-VOCAB // size)

    def rank(index, group):
        start = index * per_rank
        return token_logprobs(logits[:, start : start + per_rank].contiguous(), start, tokens, num_top, group)

    results = [as_lists(result) for result in run_sharded(size, rank)]
    expected = logits.double().log_softmax(-1)
    best, ids = expected.topk(num_top)
    for chosen, top_ids, top_logprobs in results:
        assert (chosen, top_ids, top_logprobs) == results[0]
        assert chosen == pytest.approx(expected[torch.arange(NUM_ROWS), torch.from_numpy(tokens)].tolist(), abs=1e-5)
        assert top_ids == ids.tolist()
        assert top_logprobs == [pytest.approx(row, abs=1e-5) for row in best.tolist()]


def test_a_part_has_its_own_tokens_and_no_more_of_the_likeliest_than_asked_for():
    scores = Logprobs(np.arange(6.0), np.arange(24).reshape(6, 4), -np.arange(24.0).reshape(6, 4))
    part = as_lists(scores.part(2, 5, 2))
    assert part == ([2, 3, 4], [[8, 9], [12, 13], [16, 17]], [[-8, -9], [-12, -13], [-16, -17]])
