"""Ranks in processes of their own gather each other's numbers."""

import multiprocessing

import pytest
import torch

from dflash_ray.sampling.ranks import ProcessGroupRanks
from dflash_ray.target_group.tensor_parallel import create_store, join_store

SIZE = 2


def values_of(rank: int) -> list[torch.Tensor]:
    """The shapes that verification gathers: partials, maxima, histograms, and those of an empty step."""
    shapes = ((3, 4), (5,), (2, 256), (0, 4))
    return [torch.arange(torch.Size(shape).numel()).view(shape) + 1000 * rank for shape in shapes]


def run_rank(rank: int, port: int, results) -> None:
    store = join_store("127.0.0.1", port, SIZE, 60)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    group = ProcessGroupRanks(None, SIZE)
    gathered = [
        group.all_gather(values.to(dtype)) for values in values_of(rank) for dtype in (torch.int64, torch.float64)
    ]
    results.put((rank, [each.tolist() for each in gathered]))
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_every_rank_gets_the_numbers_of_all_in_their_order():
    context = multiprocessing.get_context("spawn")
    store, results = create_store("127.0.0.1", SIZE, 60), context.Queue()
    ranks = [context.Process(target=run_rank, args=(rank, store.port, results)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    gathered = dict(results.get(timeout=100) for _ in ranks)
    for process in ranks:
        process.join(timeout=30)
    pairs = zip(values_of(0), values_of(1), strict=True)
    expected = [torch.stack(pair).to(dtype).tolist() for pair in pairs for dtype in (torch.int64, torch.float64)]
    assert gathered == {0: expected, 1: expected}
