"""A prompt goes on from the rows that the target says it has, and its request learns how many were found computed."""

from __future__ import annotations

import pytest

from dflash_ray.pb import target_pb2
from dflash_ray.router.actions import Emit
from tests.toy import ToyTarget, answer
from tests.unit.router.scenes import Scene

CHUNK = "router.prefill_chunk_tokens=8"


class WatchedScene(Scene):
    """Keeps what is said of found rows."""

    def __init__(self, *overrides: str, target: ToyTarget) -> None:
        self.cached: dict[int, int] = {}
        super().__init__(*overrides, target=target)

    def pump(self) -> None:
        poll = self.scheduler.poll

        def watched(now: float):
            actions = poll(now)
            for action in actions:
                if isinstance(action, Emit):
                    ids = action.sequence_ids.tolist()
                    self.cached |= {ids[i]: count for i, count in action.num_cached_tokens.items()}
            return actions

        self.scheduler.poll = watched
        super().pump()
        self.scheduler.poll = poll


def test_a_prompt_whose_rows_were_found_is_asked_for_the_rest_alone():
    scene = WatchedScene(CHUNK, target=ToyTarget(finds=lambda sequence_id: 4))
    prompt = list(range(40))
    sequence = scene.arrive(prompt, max_new=3)
    lens = []
    while not scene.emitted[sequence.sequence_id]:
        scene.finish_step()
        lens.append(list(scene.steps[len(lens)].prefill_lens))
    assert lens == [[8], [8]], "16 rows are found and 8 computed, then 12 are found and 4 are left"
    assert scene.cached == {sequence.sequence_id: 16 + 12}
    scene.finish_step()
    scene.finish_step()
    assert scene.emitted[sequence.sequence_id] == answer(prompt, 3)


def test_a_prompt_that_waits_for_anothers_rows_is_asked_for_again():
    scene = WatchedScene(CHUNK, target=ToyTarget(finds=lambda sequence_id: sequence_id // 2))
    first, second = (scene.arrive(list(range(20)), max_new=2) for _ in range(2))
    while len(scene.finished) < 2:
        scene.finish_step()
    assert scene.emitted[first.sequence_id] == scene.emitted[second.sequence_id] == answer(list(range(20)), 2)


def test_columns_of_rows_that_do_not_fit_the_step_are_refused():
    scene = Scene(CHUNK)
    scene.arrive([1, 2, 3], max_new=2)
    scene.pump()
    result = scene.target.step(scene.step)
    broken = target_pb2.StepResult()
    broken.CopyFrom(result)
    del broken.kv_lens[:]
    with pytest.raises(ValueError, match="kv_lens"):
        scene.scheduler.step_done(broken, 0.0)
