"""Two steps may be at the target: of different sequences, answered in their order, a suspect's by itself."""

import itertools

import pytest

from dflash_ray.config import load_config
from dflash_ray.pb import router_pb2, target_pb2
from dflash_ray.router.actions import Emit, RunStep
from dflash_ray.router.scheduler import Scheduler
from tests.toy import ToyTarget, answer, token_request

FIXED = router_pb2.SPECULATION_POLICY_FIXED
ENDLESS = [[n, n + 1] for n in range(49) if len(answer([n, n + 1], 20)) == 20]  # no stop token comes


class Group:
    """A scheduler and a toy target that answers when it is told to."""

    def __init__(self, *overrides: str, draft=None) -> None:
        self.scheduler, self.target = Scheduler(load_config(None, list(overrides))), ToyTarget(draft=draft)
        self.scheduler.target_ready(self.target.limits, 0.0)
        self.sent: list[target_pb2.Step] = []
        self.tokens: dict[int, list[int]] = {}
        self._prompts = itertools.cycle(ENDLESS)

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
        """The target's answer; drafts of its own take as long as a pass."""
        step = self.sent.pop(0)
        result = self.target.step(step)
        result.timings.forward_ns = 5_000_000
        result.timings.draft_ns = 5_000_000 if step.colocated_draft_ids else 0
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
        assert group.sent[1].is_ahead
        assert list(group.sent[1].base_lens) == [2 + len(group.tokens[i]) for i in group.sent[1].verify_ids]
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


def right(tokens: list[int], count: int) -> list[int]:
    return answer(tokens, count)


def wrong(tokens: list[int], count: int) -> list[int]:
    return [49] * count


def test_steps_with_drafts_of_the_targets_own_run_ahead_of_results():
    group = Group("router.prefer_ngram=false", draft=right)
    ids = {group.arrive(draft_tokens=3) for _ in range(3)}
    assert group.poll() == [ids], "prompts are waited for"
    group.answer()
    for _ in range(4):
        assert group.poll() == [ids, ids]
        first, second = group.sent
        assert list(first.num_own_drafts) == [3, 3, 3] and list(first.num_drafts) == [0, 0, 0]
        assert second.is_ahead and not first.draft_token_ids
        known = {i: len(group.tokens[i]) for i in ids}
        group.answer()
        group.poll()
        assert all(len(group.tokens[i]) == known[i] + 4 for i in ids), "all drafts are accepted"
    while group.sent:
        group.answer()
        group.poll()
    assert sorted(group.tokens.values()) == sorted(answer(prompt, 20) for prompt in ENDLESS[:3])
    assert group.scheduler.num_draft_tokens >= 36 and group.scheduler.num_running == 0


def test_who_ends_unforeseen_is_left_out_of_the_step_ahead_by_the_target():
    group = Group("router.prefer_ngram=false", draft=right)
    ids = [group.arrive(draft_tokens=3, max_new=4), group.arrive(draft_tokens=3)]
    group.poll()
    group.answer()
    assert group.poll() == [set(ids), set(ids)], "the first may get one token of four"
    group.answer()
    result = group.target.step(group.sent[0])
    statuses = dict(zip(result.sequence_ids, result.statuses, strict=True))
    assert statuses == {ids[0]: target_pb2.ENTRY_STATUS_ENDED, ids[1]: target_pb2.ENTRY_STATUS_OK}
    group.sent.pop(0)
    group.scheduler.step_done(result, 0.0)
    group.poll()
    assert group.tokens[ids[0]] == answer(ENDLESS[0], 4)


def test_a_fixed_number_of_drafts_is_waited_for_where_an_ngram_may_have_to_stand_in():
    group = Group(draft=right)
    drafted, plain = group.arrive(draft_tokens=3), group.arrive(draft_tokens=3)
    group.scheduler.drafting.table.may_be_drafted[:] = [True, False, *[True] * 62]
    group.poll()
    group.scheduler.drafting.table.may_be_drafted[1] = False
    group.answer()
    assert group.poll() == [{drafted, plain}]


@pytest.mark.parametrize("draft", [right, wrong])
def test_where_the_drafter_is_in_the_target_no_step_waits_for_the_one_before_it(draft):
    group = Group("router.policy=adaptive", "router.prefer_ngram=false", draft=draft)
    num_ahead = num_asked = num_steps = 0
    for step in range(300):
        if not group.scheduler.num_running:
            group.arrive(draft_tokens=3, policy=router_pb2.SPECULATION_POLICY_ADAPTIVE)
        in_flight = group.poll(now=0.01 * step)
        is_prompt = bool(group.sent[0].prefill_ids)
        num_steps += not is_prompt
        num_ahead += len(in_flight) == 2
        num_asked += bool(group.sent[0].colocated_draft_ids)
        group.answer(now=0.01 * step + 0.009)
    assert num_asked > (100 if draft is right else 2) and num_ahead > 0.7 * num_steps


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


def test_a_lesson_waits_for_the_next_result_while_another_step_is_at_the_target():
    group = Group()
    group.arrive(draft_tokens=1, policy=router_pb2.SPECULATION_POLICY_ADAPTIVE)
    group.poll()
    group.answer(now=0.5)
    assert group.scheduler.has_lesson, "nothing runs, and the target waits for the next step"
    group.poll(now=1.0)
    controller = group.scheduler.speculating.controller
    assert group.sent and controller.has_lesson and not group.scheduler.has_lesson
    group.answer(now=1.5)
    assert controller.costs.is_known, "the result made up for it"


def test_a_sequence_in_two_steps_is_lost_once_with_its_group():
    group = Group()
    group.arrive()
    group.poll()
    group.answer()
    (first, second) = group.poll()
    assert first == second, "one step is ahead of the other"
    (sequence,) = group.scheduler._requests.by_id.values()
    group.scheduler.target_lost(1.0)
    assert sequence.num_losses == 1


def test_a_result_without_columns_of_zeros_says_that_nothing_was_accepted_and_nobody_ends():
    group = Group()
    sequence_id = group.arrive()
    group.poll()
    group.answer()
    group.poll()
    result = group.target.step(group.sent.pop(0))
    result.ClearField("num_accepted_drafts")
    result.ClearField("finish_reasons")
    group.scheduler.step_done(result, 0.0)
    group.poll()
    assert len(group.tokens[sequence_id]) == 2 and group.scheduler.num_running == 1
