"""Two steps may be at the target: of different sequences, answered in their order, a suspect's by itself."""

from dataclasses import replace

import numpy as np
import pytest

from dflash_ray.config import load_config
from dflash_ray.core.draft_blocks import DraftBlock, to_message
from dflash_ray.pb import router_pb2, target_pb2
from dflash_ray.router.actions import Emit, RunStep
from dflash_ray.router.scheduler import Scheduler
from tests.toy import ToyTarget, answer, token_request

FIXED = router_pb2.SPECULATION_POLICY_FIXED
ENDLESS = [[n, n + 1] for n in range(49) if len(answer([n, n + 1], 20)) == 20]  # no stop token comes


class Group:
    """A scheduler and a toy target that answers when it is told to."""

    def __init__(self, *overrides: str) -> None:
        self.scheduler, self.target = Scheduler(load_config(None, list(overrides))), ToyTarget()
        self.scheduler.target_ready(self.target.limits, 0.0)
        self.sent: list[target_pb2.Step] = []
        self.tokens: dict[int, list[int]] = {}
        self._prompts = iter(ENDLESS)

    def arrive(self, num_losses: int = 0, draft_tokens: int = 0, max_new: int = 20, policy: int = FIXED) -> int:
        request = token_request(next(self._prompts), max_new, draft_tokens, policy)
        request.num_losses = num_losses
        return self.scheduler.arrive(request, 0.0).sequence_id

    def poll(self, now: float = 0.0) -> list[set[int]]:
        """The steps in flight, each as the sequences in it."""
        for action in self.scheduler.poll(now):
            match action:
                case RunStep(step):
                    self.sent.append(step)
                case Emit():
                    for sequence_id, tokens, _ in action.entries():
                        self.tokens.setdefault(sequence_id, []).extend(tokens)
        return [{*step.prefill_ids, *step.verify_ids} for step in self.sent]

    def answer(self, now: float = 0.0) -> None:
        """The target's answer, with colocated drafts that are always wrong, and take as long as a pass."""
        step = self.sent.pop(0)
        result = self.target.step(step)
        result.timings.forward_ns = 5_000_000
        lens = dict(zip(result.sequence_ids, result.committed_lens, strict=True))
        blocks = [
            DraftBlock(asked, lens[asked], np.full((count, 1), 49, np.uint32), np.full((count, 1), -0.5, np.float32))
            for asked, count in zip(step.colocated_draft_ids, step.colocated_num_drafts, strict=True)
        ]
        if blocks:
            result.timings.draft_ns = 5_000_000
            result.colocated_drafts.CopyFrom(to_message(0, blocks))
        self.scheduler.step_done(result, now)


def test_one_cohort_is_sent_while_the_other_runs():
    group = Group("router.cohorts=2")
    ids = {group.arrive() for _ in range(4)}
    assert group.poll() == [ids], "prompts know no cohorts"
    group.answer()
    for _ in range(4):
        first, second = group.poll()
        assert not first & second and first | second == ids
        group.answer()


def test_with_one_cohort_only_prompts_go_beside_a_step_with_drafts():
    group = Group("router.steps_in_flight=2", "router.policy=fixed")
    old = group.arrive(draft_tokens=1)
    group.poll()
    group.answer()
    group.poll(now=9.0)
    group.answer()
    assert group.poll(now=9.0) == [{old}]
    new = group.arrive()
    assert group.poll(now=9.0) == [{old}, {new}]
    group.arrive()
    assert group.poll(now=9.0) == [{old}, {new}], "two at a time"


def test_a_plain_step_is_sent_while_the_one_before_it_runs():
    group = Group()
    ids = {group.arrive() for _ in range(3)}
    assert group.poll() == [ids], "prompts are waited for"
    group.answer()
    for _ in range(5):
        assert group.poll() == [ids, ids]
        assert [a + 1 for a in group.sent[0].base_lens] == list(group.sent[1].base_lens)
        group.answer()


def test_what_arrives_meanwhile_goes_along_and_decodes_with_all_once_its_first_token_is_there():
    group = Group()
    ids = {group.arrive() for _ in range(2)}
    group.poll()
    group.answer()
    group.poll()
    group.answer()
    new = group.arrive()
    assert group.poll() == [ids, ids | {new}]
    group.answer()
    assert group.poll() == [ids | {new}], "which of them decode is known with its result"
    group.answer()
    assert group.poll() == [ids | {new}, ids | {new}]


def test_who_ends_at_its_length_is_not_sent_ahead():
    group = Group()
    ids = {group.arrive(max_new=3), group.arrive()}
    group.poll()
    group.answer()
    assert [len(step) for step in group.poll()] == [2, 2]
    group.answer()
    assert group.poll()[1] == {max(ids)}
    group.answer()
    group.answer()
    assert [set(step.close) for step in group.sent] == [] and group.poll()[0] == {max(ids)}


def test_a_step_ahead_counts_for_nothing_where_the_one_before_it_found_no_page():
    group = Group()
    [first, second] = [group.arrive() for _ in range(2)]
    group.poll()
    group.answer()
    group.poll()
    step = group.sent.pop(0)
    unable = target_pb2.Step.FromString(step.SerializeToString())
    unable.base_lens[1] += 1  # the toy takes nothing for it
    result = group.target.step(unable)
    result.statuses[1] = target_pb2.ENTRY_STATUS_NO_PAGES
    group.scheduler.step_done(result, 0.0)
    group.poll()
    for _ in range(40):
        if not group.sent:
            break
        group.answer()
        group.poll()
    assert group.scheduler.num_running == 0
    assert group.tokens[first] == answer(ENDLESS[0], 20) and group.tokens[second] == answer(ENDLESS[1], 20)


def test_where_the_drafter_is_in_the_target_plain_steps_run_ahead_unless_drafts_are_asked_for():
    group = Group("router.policy=adaptive")
    group.target.limits = replace(group.target.limits, colocated_draft_tokens=4)
    group.scheduler.target_ready(group.target.limits, 0.0)
    num_ahead = num_asked = 0
    for step in range(300):
        if not group.scheduler.num_running:
            group.arrive(draft_tokens=3, policy=router_pb2.SPECULATION_POLICY_ADAPTIVE)
        in_flight = group.poll(now=0.01 * step)
        num_ahead += len(in_flight) == 2
        num_asked += bool(group.sent[0].colocated_draft_ids)
        assert len(in_flight) == 1 or not group.sent[0].colocated_draft_ids, "its drafts are waited for"
        group.answer(now=0.01 * step + 0.009)
    assert num_asked > 2 and num_ahead > 100


def test_one_step_at_a_time_where_the_configuration_says_so():
    group = Group("router.steps_in_flight=1")
    ids = {group.arrive() for _ in range(2)}
    for _ in range(4):
        assert group.poll() == [ids]
        group.answer()


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
