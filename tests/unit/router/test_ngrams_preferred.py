"""An n-gram takes a drafter's place where it is right more often, and the drafter misses no context by it."""

import numpy as np

from dflash_ray.config import load_config
from dflash_ray.core.arrays import packed
from dflash_ray.core.draft_blocks import DraftBlock, to_message
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import RequestDrafts, RunStep
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.scheduler import Scheduler
from dflash_ray.router.speculation.controller import SpeculationController
from dflash_ray.router.speculation.cost_model import Batch
from dflash_ray.router.speculation.records import Candidates, Policy
from tests.toy import tokens_of

LIMITS = TargetLimits(1, 4096, 1000, 16, 512, 512, feature_fingerprint="f")
CYCLE = [11, 12, 13, 14, 15, 16, 17]


class CyclingTarget:
    """Goes round CYCLE, unless `says` has a token for a position."""

    def __init__(self, prompt: list[int], says: dict[int, int]) -> None:
        self.tokens = list(prompt)
        self.says = says
        self.kv_len = 0

    def next_token(self, position: int) -> int:
        return self.says.get(position, CYCLE[position % len(CYCLE)])

    def step(self, step: target_pb2.Step) -> target_pb2.StepResult:
        drafts, new = tokens_of(step.draft_token_ids), []
        for draft in [*drafts, None]:
            new.append(self.next_token(len(self.tokens) + len(new)))
            if new[-1] != draft:
                break
        rows = len(self.tokens) - self.kv_len + len(new) - 1
        result = target_pb2.StepResult(step_id=step.step_id, free_pages=500)
        result.sequence_ids.append(1)
        result.statuses.append(target_pb2.ENTRY_STATUS_OK)
        result.num_accepted_drafts.append(len(new) - 1)
        result.num_tokens.append(len(new))
        result.token_ids = packed(np.array(new))
        result.finish_reasons.append(common_pb2.FINISH_REASON_UNSPECIFIED)
        self.kv_len += rows
        self.tokens += new
        result.kv_lens.extend(self.kv_len for _ in step.prefill_ids)
        result.cached_lens.extend(0 for _ in step.prefill_ids)
        return result


def run(prompt: list[int], num_steps: int, says: dict[int, int] | None = None, *overrides: str):
    """Steps of one sequence; the drafter answers each request with a wrong token. Returns steps, requests, tokens."""
    settings = ["router.policy=fixed", "router.draft_tokens=3", "router.prefill_chunk_tokens=512"]
    scheduler = Scheduler(load_config(None, [*settings, *overrides]))
    scheduler.target_ready(LIMITS, 0.0)
    scheduler.drafting.join(DrafterState("d", needs_features=True, max_draft_tokens=7))
    request = router_pb2.GenerateTokensRequest(
        token_ids=prompt, prompt_len=len(prompt), stopping=common_pb2.StoppingParams(max_new_tokens=4000)
    )
    scheduler.arrive(request, 0.0)
    target, steps, requests = CyclingTarget(prompt, says or {}), [], []
    while len(steps) < num_steps:
        for action in scheduler.poll(0.0):
            if isinstance(action, RequestDrafts):
                requests.append(action.request)
                reply = drafter_pb2.DraftReply(request_id=action.request.request_id)
                wrong, log_probs = np.array([[999]], dtype=np.uint32), np.zeros((1, 1), dtype=np.float32)
                lengths = action.request.committed_lens
                reply.blocks.CopyFrom(to_message(1, [DraftBlock(1, length, wrong, log_probs) for length in lengths]))
                scheduler.drafts_done("d", reply, 0.0)
            elif isinstance(action, RunStep):
                steps.append(action.step)
                result = target.step(action.step)
                scheduler.step_done(result, 0.0)
    return scheduler, steps, requests, target.tokens


def test_a_text_that_repeats_is_drafted_without_the_drafter():
    scheduler, steps, requests, tokens = run(CYCLE * 2, 20)
    assert not any(request.sequence_ids for request in requests)
    assert all(step.num_drafts[0] == 3 for step in steps[1:])
    assert scheduler.num_drafts_by_source == {"ngram": 19}
    assert tokens == (CYCLE * 20)[: len(tokens)] and len(tokens) == 14 + 1 + 19 * 4


def test_a_drafter_that_is_asked_for_nothing_is_told_once_where_the_rows_are():
    _, _, requests, tokens = run(CYCLE * 2, 200)
    assert len(tokens) > 700
    assert [(list(request.open), list(request.sequence_ids)) for request in requests] == [([1], [])]


def test_a_drafter_is_asked_every_time_where_ngrams_are_not_preferred():
    scheduler, _, requests, _ = run(CYCLE * 2, 10, {}, "router.prefer_ngram=false")
    assert sum(len(request.sequence_ids) for request in requests) == 9
    assert scheduler.num_drafts_by_source == {"remote": 9}


def test_whoever_is_more_likely_right_drafts():
    """By the length of the match: drafters that are always wrong lose to any, and drafters that are right to none."""
    controller = SpeculationController(1)
    controller.open(0, Policy.FIXED, 3)
    slot = np.array([0])

    def asks(match_len: int) -> bool:
        lens = np.array([3])
        candidates = Candidates(slot, lens, lens, np.array([match_len]), lens * (match_len > 0))
        return bool(controller.plan(candidates, Batch(1, 1, 20), 50, 0.0)[0])

    assert asks(0) and not asks(5)
    for accepted, expected in ((3, [True, True, True]), (0, [True, False, False])):
        for _ in range(200):
            controller.acceptance.saw_drafts(slot, np.array([3]), np.array([accepted]), np.full((1, 3), np.nan))
        assert [asks(match_len) for match_len in (0, 3, 5)] == expected
