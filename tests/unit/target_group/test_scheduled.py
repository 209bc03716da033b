"""Scheduler and engine together, a drafter inside the target: the tokens of plain decoding, from steps sent ahead."""

from __future__ import annotations

from collections import deque

import pytest

from dflash_ray.config import load_config
from dflash_ray.pb import common_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import CloseSequences, Emit, RunStep
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.scheduler import Scheduler
from dflash_ray.target_group.codec import decode_step, encode_result
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.step_check import check_step
from tests.own_drafter import Guessing
from tests.steps import LIMITS, PROMPT, VOCAB, opening, plain, run
from tests.unit.target_group.conftest import CONFIG
from tests.unit.target_group.test_engine import new_engine

TEXTS = {number: [*PROMPT[number % 3 :], number] for number in range(1, 6)}
FIXED, ADAPTIVE = router_pb2.SPECULATION_POLICY_FIXED, router_pb2.SPECULATION_POLICY_ADAPTIVE


def request_of(number: int, policy: int, temperature: float) -> router_pb2.GenerateTokensRequest:
    return router_pb2.GenerateTokensRequest(
        token_ids=TEXTS[number],
        prompt_len=len(TEXTS[number]),
        sampling=common_pb2.SamplingParams(temperature=temperature, top_p=1.0, repetition_penalty=1.0, seed=11),
        stopping=common_pb2.StoppingParams(max_new_tokens=14 + 5 * number),
        speculation=router_pb2.Speculation(policy=policy, draft_tokens=4),
    )


def serve(scheduler: Scheduler, engine: Engine, requests: list[router_pb2.GenerateTokensRequest]):
    """New tokens by sequence, and how many steps with own drafts were ahead; requests come one every few steps."""
    waiting, sent = deque(requests), deque()
    tokens: dict[int, list[int]] = {}
    now, num_steps, num_ahead = 0.0, 0, 0

    def pump() -> None:
        for action in scheduler.poll(now):
            match action:
                case RunStep(step):
                    sent.append(step.SerializeToString())
                case CloseSequences(ids):
                    sent.append(ids)
                case Emit():
                    for sequence_id, new, _ in action.entries():
                        tokens.setdefault(sequence_id, []).extend(new)

    while waiting or sent:
        if waiting and num_steps % 4 == 0:
            scheduler.arrive(waiting.popleft(), now)
            pump()
        num_steps += 1
        now += 0.01
        if isinstance(sent[0], bytes):
            message = target_pb2.Step.FromString(sent.popleft())
            num_ahead += message.is_ahead and sum(message.num_own_drafts) > 0
            step = decode_step(message)
            check_step(step, LIMITS)
            result = encode_result(engine.step(step)).SerializeToString()
            scheduler.step_done(target_pb2.StepResult.FromString(result), now)
            pump()
        else:
            engine.close(sent.popleft())
    return tokens, num_ahead


@pytest.mark.parametrize("tree_width", [1, 2])
@pytest.mark.parametrize("policy", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_are_plain_decodings_whatever_is_drafted_ahead(runner, policy, temperature, tree_width):
    engine = new_engine(runner)
    truth = {
        number: run(engine, opening(number, text, max_new=14 + 5 * number, temperature=temperature), plain)
        for number, text in TEXTS.items()
    }
    whole = {number: [*text, *truth[number]] for number, text in TEXTS.items()}
    drafting = Engine(runner, CONFIG.target.num_pages, CONFIG.target.page_size, 256, Guessing(whole, rate=0.8))
    scheduler = Scheduler(load_config(None, [f"router.tree_width={tree_width}", "drafter.placement_mode=colocated"]))
    limits = TargetLimits(
        1, 256, VOCAB, CONFIG.target.page_size, CONFIG.target.num_pages, 64,
        colocated_draft_tokens=4, feature_fingerprint="x",
    )  # fmt: skip
    scheduler.target_ready(limits, 0.0)
    tokens, num_ahead = serve(scheduler, drafting, [request_of(number, policy, temperature) for number in TEXTS])
    assert tokens == truth
    assert num_ahead > 10 or policy == ADAPTIVE
    assert drafting.allocator.num_free == drafting.allocator.num_pages
