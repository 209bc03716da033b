"""Whatever happens around it, the scheduler gives every request the target's tokens, each once and in order."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dflash_ray.config import load_config
from dflash_ray.pb import router_pb2, target_pb2
from dflash_ray.router.actions import (
    CloseSequences,
    DropDrafter,
    DropTarget,
    Emit,
    Fail,
    RequestDrafts,
    RunStep,
)
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.scheduler import Scheduler
from dflash_ray.router.slot_table import NEVER
from tests.toy import VOCAB, ToyDrafter, ToyTarget, answer, token_request

PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
POLICIES = st.sampled_from([router_pb2.SPECULATION_POLICY_FIXED, router_pb2.SPECULATION_POLICY_ADAPTIVE])
ARRIVALS = st.tuples(PROMPTS, st.integers(1, 25), st.integers(0, 5), POLICIES)
PLAIN_ARRIVALS = st.tuples(PROMPTS, st.integers(1, 25), st.just(0), POLICIES)
MAX_BATCH_TOKENS = 24


def draft_inside(kind: str | None):
    """What a toy target's own drafter drafts behind known tokens; now and then nothing."""
    if kind is None:
        return None

    def draft(tokens: list[int], count: int) -> list[int]:
        is_right = kind == "right" or (kind == "mixed" and len(tokens) % 2)
        if len(tokens) % 5 == 0:
            return []
        return answer(tokens, count) if is_right else [(tokens[-1] * 7 + k) % VOCAB for k in range(count)]

    return draft


class SchedulerMachine(RuleBasedStateMachine):
    """Target and drafters answer late, wrongly or never; requests come and go."""

    @initialize(
        cohorts=st.sampled_from([1, 2]),
        depth=st.sampled_from([1, 2, None]),
        num_pages=st.sampled_from([14, 18, 24, 200]),
        finds=st.sampled_from([None, lambda sequence_id: sequence_id % 4]),
        tree_width=st.sampled_from([1, 2]),
        drafts_inside=st.sampled_from([None, None, "right", "garbage", "mixed"]),
    )
    def start(self, cohorts, depth, num_pages, finds, tree_width, drafts_inside):
        overrides = [
            f"router.tree_width={tree_width}",
            f"router.cohorts={cohorts}",
            *([f"router.steps_in_flight={depth}"] if depth else []),
            "router.prefill_chunk_tokens=8",
            "router.max_running=6",
            "router.draft_tokens=3",
            f"target.max_batch_tokens={MAX_BATCH_TOKENS}",
        ]
        self.scheduler = Scheduler(load_config(None, overrides))
        self.new_target = lambda: ToyTarget(
            num_pages=num_pages, max_batch_tokens=MAX_BATCH_TOKENS, finds=finds, draft=draft_inside(drafts_inside)
        )
        self.target = self.new_target()
        self.now = 0.0
        self.runs_ahead = cohorts == 1 and depth != 1
        self.depth = 2 if self.runs_ahead else depth or cohorts
        self.sent: list[target_pb2.Step | list[int]] = []  # steps and closes that the target has not come to
        self.void: set[int] = set()  # sequences for which the oldest step that was sent does nothing
        self.drafters: dict[str, ToyDrafter] = {}
        self.alive: dict[int, tuple] = {}  # sequence id -> (sequence, prompt, max new tokens, emitted tokens)
        self.scheduler.target_ready(self.target.limits, self.now)
        self.pump()

    @property
    def steps(self):
        return [message for message in self.sent if isinstance(message, target_pb2.Step)]

    @property
    def has_preempted(self):
        return self.scheduler.num_preemptions > 0

    def pump(self):
        while actions := self.scheduler.poll(self.now):
            for action in actions:
                self.perform(action)

    def perform(self, action):
        match action:
            case RunStep(step):
                assert len(self.steps) < self.depth
                rows = sum(step.prefill_lens) + len(step.verify_ids) + sum(step.num_drafts) + sum(step.num_own_drafts)
                assert 0 < rows <= MAX_BATCH_TOKENS
                self.sent.append(step)
                self.check_overlap()
            case CloseSequences(ids) if self.sent:
                self.sent.append(ids)  # the stream is in order: the target runs the steps first
            case CloseSequences(ids):
                self.target.close(ids)
            case RequestDrafts(drafter_id, request):
                self.drafters[drafter_id].take(request)
            case DropTarget():
                self.lose_target()
            case DropDrafter(drafter_id):
                self.lose_drafter(drafter_id)
            case Emit():
                for sequence_id, tokens, reason in action.entries():
                    self.emitted(sequence_id, tokens, reason)
            case Fail(sequence):
                assert sequence.num_losses == 3, "only what ends group after group may fail"
                del self.alive[sequence.sequence_id]

    def check_overlap(self):
        """A sequence is in two steps only as a chain of both, with no drafts but the target's own.

        A step that counted on one which came to nothing for a sequence does nothing for it, and does not count here.
        """
        alive = [set(self.alive) - self.void if step is self.steps[0] else self.alive for step in self.steps]
        ids = [
            i
            for step, its in zip(self.steps, alive, strict=True)
            for i in (*step.prefill_ids, *step.verify_ids)
            if i in its
        ]
        if self.has_preempted or len(set(ids)) == len(ids):
            return
        assert self.runs_ahead
        both = {i for i in ids if ids.count(i) == 2}
        for step in self.steps:
            without = {i for i, count in zip(step.verify_ids, step.num_drafts, strict=True) if not count}
            assert both <= without
        assert not both or (self.steps[1].is_ahead and both <= set(self.steps[1].verify_ids))

    def emitted(self, sequence_id, tokens, reason):
        _, prompt, max_new, so_far = self.alive[sequence_id]
        so_far += tokens
        expected = answer(prompt, max_new)
        assert so_far == expected[: len(so_far)]
        if reason:
            is_whole = so_far == expected
            fills_the_cache = len(prompt) + len(so_far) + 6 > self.target.limits.num_pages * 4
            assert is_whole or fills_the_cache
            del self.alive[sequence_id]

    @rule(arrivals=st.lists(ARRIVALS, min_size=1, max_size=6) | st.lists(PLAIN_ARRIVALS, min_size=1, max_size=6))
    def arrive(self, arrivals):
        for prompt, max_new, draft_tokens, policy in arrivals:
            sequence = self.scheduler.arrive(token_request(prompt, max_new, draft_tokens, policy), self.now)
            self.alive[sequence.sequence_id] = (sequence, prompt, max_new, [])
            self.pump()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        sequence_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.cancel(self.alive.pop(sequence_id)[0])
        self.pump()

    @precondition(lambda self: self.steps)
    @rule()
    def finish_step(self):
        result = self.target.step(self.sent.pop(0))
        is_ok = [status == target_pb2.ENTRY_STATUS_OK for status in result.statuses]
        self.void = {i for i, flag in zip(result.sequence_ids, is_ok, strict=True) if not flag} - self.void
        while self.sent and not isinstance(self.sent[0], target_pb2.Step):
            self.target.close(self.sent.pop(0))
        self.scheduler.step_done(result, self.now)
        self.pump()

    @precondition(lambda self: any(drafter.request is not None for drafter in self.drafters.values()))
    @rule(data=st.data(), kind=st.sampled_from(["right", "garbage", "none", "stale"]))
    def drafter_answers(self, data, kind):
        busy = sorted(name for name, drafter in self.drafters.items() if drafter.request is not None)
        self.let_answer(data.draw(st.sampled_from(busy)), kind)

    def let_answer(self, name, kind):
        def draft(sequence_id, committed_len, count):
            if kind == "none":
                return []
            if kind == "right" and sequence_id in self.alive:
                _, prompt, _, _ = self.alive[sequence_id]
                at = committed_len - len(prompt)
                return answer(prompt, at + count)[at:]
            return [(sequence_id * 7 + k) % VOCAB for k in range(count)]

        reply = self.drafters[name].answer(draft, self.target)
        if kind == "stale":
            reply.blocks.committed_lens[:] = [length - 1 for length in reply.blocks.committed_lens]
        self.scheduler.drafts_done(name, reply, self.now)
        self.pump()

    @precondition(lambda self: self.drafters)
    @rule(data=st.data())
    def drafter_forgets(self, data):
        self.drafters[data.draw(st.sampled_from(sorted(self.drafters)))].forget()

    @precondition(lambda self: self.drafters)
    @rule(data=st.data(), lag=st.integers(0, 3), is_cut_off=st.booleans())
    def rows_come_late_or_not_at_all(self, data, lag, is_cut_off):
        drafter = self.drafters[data.draw(st.sampled_from(sorted(self.drafters)))]
        drafter.lag, drafter.is_cut_off = lag, is_cut_off

    @rule(rounds=st.integers(1, 12), kind=st.sampled_from(["right", "garbage"]))
    def everything_runs(self, rounds, kind):
        for _ in range(rounds):
            for name, drafter in list(self.drafters.items()):
                if drafter.request is not None:
                    self.let_answer(name, kind)
            if self.steps:
                self.finish_step()

    @rule(name=st.sampled_from(["a", "b"]), num_rows=st.sampled_from([20, 10_000]))
    def drafter_joins(self, name, num_rows):
        if name not in self.drafters:
            self.drafters[name] = ToyDrafter(num_rows)
            self.scheduler.drafting.join(DrafterState(name, True, 7))
            self.pump()

    @precondition(lambda self: self.drafters)
    @rule(data=st.data())
    def drafter_is_lost(self, data):
        self.lose_drafter(data.draw(st.sampled_from(sorted(self.drafters))))
        self.pump()

    def lose_drafter(self, name):
        del self.drafters[name]
        self.scheduler.drafter_lost(name)

    @rule(seconds=st.sampled_from([0.01, 0.2, 3.0, 200.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.pump()

    @rule()
    def target_is_lost_and_comes_back(self):
        self.lose_target()
        self.pump()

    def lose_target(self):
        self.sent.clear()
        self.void.clear()
        self.scheduler.target_lost(self.now)
        self.pump()
        self.target = self.new_target()
        self.now += 1.0
        self.scheduler.target_ready(self.target.limits, self.now)

    @invariant()
    def the_target_never_has_more_pages_in_use_than_there_are(self):
        if hasattr(self, "target"):
            assert self.target.used_pages <= self.target.limits.num_pages

    @invariant()
    def what_is_counted_is_what_the_slots_say(self):
        if hasattr(self, "scheduler"):
            table = self.scheduler.drafting.table
            used = table.ids > 0
            assert table.num_in_phase == [int((table.phases == phase).sum()) for phase in range(3)]
            assert table.num_in_cohort == [int((used & (table.cohorts == cohort)).sum()) for cohort in (0, 1)]
            assert ((table.phases > 0) == used).all() and table.num_running == used.sum()
            assert not table.step_ids[~used].any() and (table.draft_deadlines[~used] == NEVER).all()
            assert all(table.sequence(slot).slot == slot for slot in used.nonzero()[0].tolist())

    def teardown(self):
        """Left alone, everything finishes: nothing waits for an event that will not come."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(6000):
            if not self.alive:
                break
            self.now += 0.2  # past every draft deadline
            self.pump()
            if self.steps:
                self.finish_step()
        assert not self.alive
        self.pump()
        while self.steps:
            self.finish_step()
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert not self.target.sequences


SchedulerMachine.TestCase.settings = settings(
    max_examples=max(200, settings().max_examples), stateful_step_count=30, deadline=None
)
TestScheduler = SchedulerMachine.TestCase
