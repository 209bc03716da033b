"""A scheduler beside toy targets and drafters, driven by hand."""

from __future__ import annotations

from dflash_ray.config import load_config
from dflash_ray.pb import target_pb2
from dflash_ray.router.actions import CloseSequences, Emit, Fail, RequestDrafts, RunStep
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.scheduler import Scheduler
from dflash_ray.router.sequence import RouterSequence
from tests.toy import ToyDrafter, ToyTarget, token_request


class Scene:
    """Time stands still unless a test moves `now`; nothing is answered unless a test lets it be. A step at a time."""

    def __init__(self, *overrides: str, target: ToyTarget | None = None, drafters: tuple[str, ...] = ()) -> None:
        self.scheduler = Scheduler(load_config(None, ["router.steps_in_flight=1", *overrides]))
        self.target = target or ToyTarget()
        self.drafters = {name: ToyDrafter() for name in drafters}
        self.now = 0.0
        self.step: target_pb2.Step | None = None
        self.steps: list[target_pb2.Step] = []
        self.emitted: dict[int, list[int]] = {}
        self.failed: dict[int, str] = {}
        self.finished: set[int] = set()
        self.others: list[object] = []
        self.scheduler.target_ready(self.target.limits, self.now)
        for name in drafters:
            self.scheduler.drafting.join(DrafterState(name, True, 7))

    def arrive(self, prompt: list[int], max_new: int = 8, draft_tokens: int = 0) -> RouterSequence:
        sequence = self.scheduler.arrive(token_request(prompt, max_new, draft_tokens), self.now)
        self.emitted[sequence.sequence_id] = []
        return sequence

    def pump(self) -> None:
        while actions := self.scheduler.poll(self.now):
            for action in actions:
                match action:
                    case RunStep(step):
                        assert self.step is None
                        self.step = step
                        self.steps.append(step)
                    case CloseSequences(ids):
                        self.target.close(ids)
                    case RequestDrafts(drafter_id, request):
                        self.drafters[drafter_id].take(request)
                    case Emit():
                        for sequence_id, tokens, reason in action.entries():
                            self.emitted[sequence_id] += tokens
                            if reason:
                                self.finished.add(sequence_id)
                    case Fail(sequence, error):
                        self.failed[sequence.sequence_id] = error.message
                    case _:
                        self.others.append(action)

    def finish_step(self) -> None:
        self.pump()
        step, self.step = self.step, None
        assert step is not None, "no step is in flight"
        result = self.target.step(step)
        self.scheduler.step_done(result, self.now)
        self.pump()

    def answer(self, name: str, tokens: list[int] | None = None) -> None:
        """The drafter answers what it was asked, every proposal with the same tokens."""
        reply = self.drafters[name].answer(
            lambda sequence_id, committed_len, count: (tokens or [0] * 9)[:count], self.target
        )
        self.scheduler.drafts_done(name, reply, self.now)
        self.pump()

    def lose_target(self) -> None:
        self.step = None
        self.scheduler.target_lost(self.now)
        self.pump()
        self.target = ToyTarget(num_pages=self.target.limits.num_pages)
        self.scheduler.target_ready(self.target.limits, self.now)
        self.pump()
