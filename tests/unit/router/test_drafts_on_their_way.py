"""What the router makes of a drafter's block on its way to the target."""

from dataclasses import replace

import numpy as np
import pytest

from dflash_ray.config import load_config
from dflash_ray.core.draft_blocks import DraftBlock, to_message
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import RequestDrafts, RunStep
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.scheduler import Scheduler
from tests.toy import VOCAB, ToyTarget, tokens_of
from tests.unit.router.scenes import Scene

NUM_CANDIDATES = 2


def step_with(drafts: list[int], *, is_drawn: bool, max_new_tokens: int = 20) -> target_pb2.Step:
    """The step that verifies what a drafter answered with these drafts."""
    scheduler, target = Scheduler(load_config(None, ["router.policy=fixed", "router.draft_tokens=4"])), ToyTarget()
    scheduler.target_ready(target.limits, 0.0)
    scheduler.drafting.join(DrafterState("d", needs_features=False, max_draft_tokens=7))
    request = router_pb2.GenerateTokensRequest(
        token_ids=[1, 2, 3],
        prompt_len=3,
        sampling=common_pb2.SamplingParams(temperature=1.0, mode=common_pb2.VERIFY_MODE_REJECTION),
        stopping=common_pb2.StoppingParams(max_new_tokens=max_new_tokens),
    )
    scheduler.arrive(request, 0.0)
    (prefill,) = [action.step for action in scheduler.poll(0.0) if isinstance(action, RunStep)]
    scheduler.step_done(target.step(prefill), 0.0)
    (wanted,) = [action.request for action in scheduler.poll(0.0) if isinstance(action, RequestDrafts)]
    reply = drafter_pb2.DraftReply(request_id=wanted.request_id)
    block = DraftBlock(
        wanted.sequence_ids[0],
        wanted.committed_lens[0],
        np.array([[draft, draft + 1] for draft in drafts], dtype=np.uint32),
        -0.5 * np.arange(len(drafts) * NUM_CANDIDATES, dtype=np.float32).reshape(-1, NUM_CANDIDATES),
        is_drawn,
    )
    reply.blocks.CopyFrom(to_message(wanted.epoch, [block]))
    scheduler.drafts_done("d", reply, 0.0)
    (step,) = [action.step for action in scheduler.poll(0.0) if isinstance(action, RunStep)]
    return step


@pytest.mark.parametrize("max_new_tokens", [20, 4], ids=["whole", "cut at the length limit"])
def test_a_drawn_draft_goes_on_with_the_distribution_of_the_slots_that_are_kept(max_new_tokens):
    step = step_with([5, 6, 7], is_drawn=True, max_new_tokens=max_new_tokens)
    kept = {20: 3, 4: 2}[max_new_tokens]
    assert tokens_of(step.draft_token_ids) == [5, 6, 7][:kept]
    assert list(step.num_draft_candidates) == [NUM_CANDIDATES]
    assert list(step.draft_candidate_ids) == [5, 6, 6, 7, 7, 8][: 2 * kept]
    assert list(step.draft_log_probs) == [0.0, -0.5, -1.0, -1.5, -2.0, -2.5][: 2 * kept]


def test_a_draft_that_was_not_drawn_goes_on_alone():
    step = step_with([5, 6, 7], is_drawn=False)
    assert not step.num_draft_candidates
    assert not step.draft_candidate_ids and not step.draft_log_probs


def test_a_draft_ends_before_a_token_that_the_target_does_not_have():
    step = step_with([5, VOCAB, 7], is_drawn=True)
    assert tokens_of(step.draft_token_ids) == [5] and list(step.draft_candidate_ids) == [5, 6]


@pytest.mark.parametrize(
    ("colocated", "draft_tokens", "wants_features"), [(0, 3, True), (4, 3, True), (0, 0, False), (4, 0, False)]
)
def test_features_are_made_for_sequences_that_are_drafted_for_wherever_the_drafter_is(
    colocated, draft_tokens, wants_features
):
    target = ToyTarget()
    target.limits = replace(target.limits, colocated_draft_tokens=colocated)
    scene = Scene(target=target)
    scene.arrive([1, 2, 3], draft_tokens=draft_tokens)
    scene.pump()
    assert [opened.wants_features for opened in scene.steps[0].open] == [wants_features]
