"""Whatever happens around it, the scheduler gives every request the target's tokens, each once and in order."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dflash_ray.config import load_config
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2
from dflash_ray.router.actions import CloseSequences, Emit, Fail, Replay, RequestDrafts, RunStep
from dflash_ray.router.drafting import DrafterState
from dflash_ray.router.scheduler import Scheduler
from tests.toy import VOCAB, ToyTarget, answer

PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


class SchedulerMachine(RuleBasedStateMachine):
    """Target and drafters answer late, wrongly or never; requests come and go."""

    @initialize(cohorts=st.sampled_from([1, 2]), num_pages=st.sampled_from([14, 24, 200]))
    def start(self, cohorts, num_pages):
        overrides = [f"router.cohorts={cohorts}", "router.prefill_chunk_tokens=8", "router.max_running=6"]
        self.scheduler = Scheduler(load_config(None, overrides))
        self.target = ToyTarget(num_pages=num_pages)
        self.now = 0.0
        self.epoch = 1
        self.step = None
        self.closes: list[int] = []
        self.requests: dict[str, drafter_pb2.DraftRequest] = {}
        self.replays: list[Replay] = []
        self.alive: dict[int, tuple] = {}  # sequence id -> (sequence, prompt, max new tokens, emitted tokens)
        self.scheduler.target_ready(self.target.limits, self.now)
        self.pump()

    def pump(self):
        for action in self.scheduler.poll(self.now):
            match action:
                case RunStep(step):
                    assert self.step is None, "one step at a time"
                    self.step = step
                case CloseSequences(ids) if self.step is not None:
                    self.closes += ids  # the stream is in order: the target runs the step first
                case CloseSequences(ids):
                    self.target.close(ids)
                case RequestDrafts(drafter_id, request):
                    self.requests.setdefault(drafter_id, []).append(request)
                case Replay():
                    self.replays.append(action)
                case Emit(sequence, tokens, _, reason):
                    self.emitted(sequence, tokens, reason)
                case Fail(sequence, error):
                    raise AssertionError(f"request failed: {error}")

    def emitted(self, sequence, tokens, reason):
        _, prompt, max_new, so_far = self.alive[sequence.sequence_id]
        so_far += tokens
        expected = answer(prompt, max_new)
        assert so_far == expected[: len(so_far)]
        if reason:
            is_whole = so_far == expected
            fills_the_cache = len(prompt) + len(so_far) + 6 > self.target.limits.num_pages * 4
            assert is_whole or fills_the_cache
            del self.alive[sequence.sequence_id]

    @rule(prompt=PROMPTS, max_new=st.integers(1, 25), draft_tokens=st.integers(0, 5))
    def arrive(self, prompt, max_new, draft_tokens):
        request = router_pb2.GenerateTokensRequest(
            token_ids=prompt,
            prompt_len=len(prompt),
            stopping=common_pb2.StoppingParams(max_new_tokens=max_new),
            speculation=router_pb2.Speculation(policy=router_pb2.SPECULATION_POLICY_FIXED, draft_tokens=draft_tokens),
        )
        sequence = self.scheduler.arrive(request, self.now)
        self.alive[sequence.sequence_id] = (sequence, prompt, max_new, [])
        self.pump()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        sequence_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.cancel(self.alive.pop(sequence_id)[0])
        self.pump()

    @precondition(lambda self: self.step is not None)
    @rule()
    def finish_step(self):
        step, self.step = self.step, None
        result = self.target.step(step)
        self.target.close(self.closes)
        self.closes = []
        self.scheduler.step_done(result, self.now)
        self.pump()

    @precondition(lambda self: any(self.requests.values()))
    @rule(data=st.data(), kind=st.sampled_from(["right", "garbage", "missing", "stale"]))
    def drafter_answers(self, data, kind):
        drafter_id = data.draw(st.sampled_from(sorted(d for d, waiting in self.requests.items() if waiting)))
        request = self.requests[drafter_id].pop(0)
        reply = drafter_pb2.DraftReply(request_id=request.request_id)
        for i, sequence_id in enumerate(request.sequence_ids):
            if kind == "missing":
                reply.missing.add(sequence_id=sequence_id)
                continue
            known = self.alive.get(sequence_id)
            count = request.num_draft_tokens[i]
            draft = [(sequence_id * 7 + k) % VOCAB for k in range(count)]
            if kind == "right" and known is not None:
                at = len(known[3])
                draft = answer(known[1], at + count)[at:]
            reply.blocks.add(
                sequence_id=sequence_id,
                epoch=request.epochs[i],
                committed_len=request.committed_lens[i] - (kind == "stale"),
                num_slots=len(draft),
                num_candidates=1,
                candidate_ids=draft,
            )
        self.scheduler.drafts_done(drafter_id, reply)
        self.pump()

    @precondition(lambda self: self.replays)
    @rule()
    def replay_arrives(self):
        replay = self.replays.pop(0)
        sequence = self.target.sequences.get(replay.sequence_id)
        rows = max(0, sequence["kv"] - replay.start) if sequence else 0
        self.scheduler.replayed(
            common_pb2.ContextFeatures(sequence_id=replay.sequence_id, start=replay.start, num_rows=rows)
        )
        self.pump()

    @rule(name=st.sampled_from(["a", "b"]))
    def drafter_joins(self, name):
        if name not in self.requests:
            self.requests[name] = []
            self.scheduler.drafting.join(DrafterState(name, True, 7))
            self.pump()

    @rule(name=st.sampled_from(["a", "b"]))
    def drafter_is_lost(self, name):
        self.requests.pop(name, None)
        self.scheduler.drafter_lost(name)
        self.pump()

    @rule(seconds=st.sampled_from([0.01, 0.2, 3.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.pump()

    @rule()
    def target_is_lost_and_comes_back(self):
        self.step = None
        self.closes.clear()
        self.replays.clear()
        self.scheduler.target_lost(self.now)
        self.pump()
        self.target = ToyTarget(num_pages=self.target.limits.num_pages)
        self.now += 1.0
        self.scheduler.target_ready(self.target.limits, self.now)
        self.pump()

    @invariant()
    def the_target_never_has_more_pages_in_use_than_there_are(self):
        if hasattr(self, "target"):
            assert self.target.used_pages <= self.target.limits.num_pages

    def teardown(self):
        """Left alone, everything finishes: nothing waits for an event that will not come."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(6000):
            if not self.alive:
                break
            self.now += 0.2  # past every draft deadline
            self.pump()
            if self.step is not None:
                self.finish_step()
        assert not self.alive
        self.pump()
        if self.step is not None:
            self.finish_step()
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert not self.target.sequences


SchedulerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestScheduler = SchedulerMachine.TestCase
