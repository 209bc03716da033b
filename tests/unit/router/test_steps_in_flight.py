"""Two steps may be at the target: of different sequences, answered in their order, a suspect's by itself."""

import pytest

from dflash_ray.config import load_config
from dflash_ray.pb import target_pb2
from dflash_ray.router.actions import RunStep
from dflash_ray.router.scheduler import Scheduler
from tests.toy import ToyTarget, answer, token_request

ENDLESS = [[n, n + 1] for n in range(49) if len(answer([n, n + 1], 20)) == 20]  # no stop token comes


class Group:
    """A scheduler and a toy target that answers when it is told to."""

    def __init__(self, *overrides: str) -> None:
        self.scheduler, self.target = Scheduler(load_config(None, list(overrides))), ToyTarget()
        self.scheduler.target_ready(self.target.limits, 0.0)
        self.sent: list[target_pb2.Step] = []
        self._prompts = iter(ENDLESS)

    def arrive(self, num_losses: int = 0) -> int:
        request = token_request(next(self._prompts), max_new=20, draft_tokens=0)
        request.num_losses = num_losses
        return self.scheduler.arrive(request, 0.0).sequence_id

    def poll(self) -> list[set[int]]:
        """The steps in flight, each as the sequences in it."""
        self.sent += [action.step for action in self.scheduler.poll(0.0) if isinstance(action, RunStep)]
        return [{*step.prefill_ids, *step.verify_ids} for step in self.sent]

    def answer(self) -> None:
        self.scheduler.step_done(self.target.step(self.sent.pop(0)), 0.0)


def test_one_cohort_is_sent_while_the_other_runs():
    group = Group("router.cohorts=2")
    ids = {group.arrive() for _ in range(4)}
    assert group.poll() == [ids], "prompts know no cohorts"
    group.answer()
    for _ in range(4):
        first, second = group.poll()
        assert not first & second and first | second == ids
        group.answer()


def test_with_one_cohort_only_prompts_go_beside_its_step():
    group = Group("router.steps_in_flight=2")
    old = group.arrive()
    group.poll()
    group.answer()
    assert group.poll() == [{old}]
    new = group.arrive()
    assert group.poll() == [{old}, {new}]
    third = group.arrive()
    assert group.poll() == [{old}, {new}], "two at a time"
    group.answer()
    assert group.poll() == [{new}, {old, third}]
    group.answer()
    assert group.poll() == [{old, third}], "a cohort is in one step at a time"


def test_a_result_out_of_turn_or_about_others_is_refused():
    group = Group("router.cohorts=2")
    for _ in range(2):
        group.arrive()
    group.poll()
    group.answer()
    group.poll()
    with pytest.raises(ValueError, match="out of turn"):
        group.scheduler.step_done(group.target.step(group.sent[1]), 0.0)
    result = group.target.step(group.sent[0])
    result.sequence_ids[0] += 1
    with pytest.raises(ValueError, match="other entries"):
        group.scheduler.step_done(result, 0.0)


def test_what_comes_back_from_the_queue_takes_nothing_of_the_step_that_it_was_in():
    group = Group("router.cohorts=2")
    ids = [group.arrive() for _ in range(2)]
    group.poll()
    group.answer()
    group.poll()
    first, second = group.sent
    youngest = ids[1]
    assert list(second.verify_ids) == [youngest]
    result = group.target.step(first)
    result.statuses[0], result.num_tokens[0], result.token_ids = target_pb2.ENTRY_STATUS_NO_PAGES, 0, b""
    group.sent.pop(0)
    group.scheduler.step_done(result, 0.0)
    group.poll()
    assert [list(step.close) for step in group.sent] == [[], [youngest]]
    tokens = {message.sequence_id: len(message.token_ids) for message in group.sent[1].open}
    assert tokens == {youngest: 3}, "it is opened again before its old step is answered"
    group.answer()
    group.answer()
    group.poll()
    [step] = [step for step in group.sent if youngest in step.verify_ids]
    assert step.base_lens[list(step.verify_ids).index(youngest)] == 4


def test_a_suspect_runs_with_no_other_step_beside_its_own():
    group = Group("router.cohorts=2", "router.steps_in_flight=2")
    suspect = group.arrive(num_losses=2)
    others = {group.arrive() for _ in range(3)}
    ran = []
    for _ in range(8):
        steps = group.poll()
        assert steps == [{suspect}] or all(step <= others for step in steps)
        ran += steps[:1]
        group.answer()
    assert {suspect} in ran and any(step <= others for step in ran)
