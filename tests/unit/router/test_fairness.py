"""Rows of a pass are shared: everyone advances, prompts too, however few rows there are."""

from collections import Counter

import numpy as np
import pytest

from dflash_ray.config import ConfigError, load_config
from dflash_ray.router.steps import draft_rows
from tests.toy import ToyTarget
from tests.unit.router.scenes import Scene


def test_sequences_that_found_no_rows_come_first_in_the_next_step():
    scene = Scene("router.max_running=12", target=ToyTarget(num_pages=200, max_batch_tokens=8))
    sequences = [scene.arrive([k, k + 1], max_new=40) for k in range(12)]
    rounds = Counter()
    for _ in range(60):
        scene.finish_step()
        rounds.update(scene.steps[-1].verify_ids)
    live = [rounds[s.sequence_id] for s in sequences if s.sequence_id not in scene.finished]
    assert max(live) - min(live) <= 1


def test_a_prompt_goes_on_while_all_rows_could_be_chains():
    scene = Scene("router.max_running=12", target=ToyTarget(num_pages=400, max_batch_tokens=8))
    for k in range(10):
        scene.arrive([k, k + 1], max_new=100)
    for _ in range(8):
        scene.finish_step()
    late = scene.arrive([3] * 30, max_new=4)
    steps = 0
    while late.sequence_id not in scene.finished:
        scene.finish_step()
        steps += 1
    assert steps < 60


@pytest.mark.parametrize(
    ("wanted", "room", "counts"),
    [([3, 3, 3], 12, [3, 3, 3]), ([3, 3, 3], 5, [2, 0, 0]), ([3, 3, 3], 2, [0, 0]), ([], 4, [])],
)
def test_every_chain_gets_its_anchor_before_drafts_are_shared_out(wanted, room, counts):
    assert draft_rows(np.array(wanted, np.int64), room).tolist() == counts


def test_more_sequences_than_a_pass_has_rows_for_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"target\.max_batch_tokens: router\.max_running 128 .* need 640"):
        load_config(None, ["router.max_running=128"])
    load_config(None, ["router.max_running=128", "target.max_batch_tokens=640"])
