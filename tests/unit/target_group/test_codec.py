"""Steps and results mean the same as messages and as arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dflash_ray.core.arrays import packed, unpacked
from dflash_ray.kernels.columns import Finish
from dflash_ray.pb import common_pb2, target_pb2
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.parameters import COUPLED, NO_LOGPROBS, REJECTION, SamplingParams
from dflash_ray.target_group.codec import decode_step, encode_result
from dflash_ray.target_group.step import EntryStatus, PromptLogprobs, StepOutput
from tests.steps import ids, ints

LARGEST = 2**64 - 1


def test_statuses_and_finishes_have_the_numbers_of_the_contract():
    names = {f"ENTRY_STATUS_{status.name}": int(status) for status in EntryStatus}
    assert names | {"ENTRY_STATUS_UNSPECIFIED": 0} == dict(target_pb2.EntryStatus.items())
    reasons = {Finish.GOES_ON: "UNSPECIFIED", Finish.STOP: "STOP", Finish.LENGTH: "LENGTH"}
    for finish, name in reasons.items():
        assert common_pb2.FinishReason.Value(f"FINISH_REASON_{name}") == finish


def test_a_steps_columns_arrive_with_ids_of_all_64_bits_and_probabilities_of_drafts():
    message = target_pb2.Step(
        step_id=3, epoch=LARGEST, close=[LARGEST], prefill_ids=[4], prefill_lens=[9], verify_ids=[LARGEST - 1, 7],
        base_lens=[12, 13], num_drafts=[2, 0], draft_token_ids=packed(ints([5, 6])), draft_parents=[0, 1],
        num_draft_candidates=[1, 0], draft_candidate_ids=[5, 6], draft_log_probs=[-0.5, -math.inf],
        colocated_draft_ids=[7], colocated_num_drafts=[3],
        num_own_drafts=[0, 5], least_own_log_prob=-1.5, is_ahead=True,
    )  # fmt: skip
    step = decode_step(message)
    assert (step.step_id, step.tree_width) == (3, 1)
    assert (step.close.tolist(), step.prefill_ids.tolist(), step.verify_ids.tolist()) == (
        [LARGEST], [4], [LARGEST - 1, 7]
    )  # fmt: skip
    assert (step.prefill_lens.tolist(), step.base_lens.tolist()) == ([9], [12, 13])
    drafts = step.drafts
    assert (drafts.counts.tolist(), drafts.token_ids.tolist(), drafts.parents.tolist()) == ([2, 0], [5, 6], [0, 1])
    assert (drafts.num_candidates.tolist(), drafts.candidate_ids.tolist()) == ([1, 0], [5, 6])
    assert drafts.candidate_probs.tolist() == [np.float32(math.exp(-0.5)), 0.0]
    assert (step.draft_ids.tolist(), step.draft_counts.tolist()) == ([7], [3])
    assert (step.own_counts.tolist(), step.least_own_log_prob, step.is_ahead) == ([0, 5], -1.5, True)


def test_a_log_probability_beyond_all_numbers_is_decoded_without_a_warning():
    step = decode_step(target_pb2.Step(draft_log_probs=[1e30, math.nan]))
    assert step.drafts.candidate_probs[0] == math.inf and math.isnan(step.drafts.candidate_probs[1])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"num_logprobs": NO_LOGPROBS, "num_prompt_logprobs": NO_LOGPROBS, "mode": COUPLED}),
        ({"num_logprobs": 0, "num_prompt_logprobs": 3}, {"num_logprobs": 0, "num_prompt_logprobs": 3}),
        ({"mode": common_pb2.VERIFY_MODE_COUPLED}, {"mode": COUPLED}),
        ({"mode": common_pb2.VERIFY_MODE_REJECTION, "seed": LARGEST}, {"mode": REJECTION, "seed": LARGEST}),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.25, "min_p": 0.125}, {"top_k": 4, "top_p": 0.25, "min_p": 0.125}),
    ],
)
def test_a_sequence_arrives_as_it_was_opened(fields, expected):
    opened = target_pb2.OpenSequence(
        sequence_id=LARGEST,
        token_ids=[3, 4, 5],
        prompt_len=2,
        sampling=common_pb2.SamplingParams(**fields, bias_token_ids=[9], bias_values=[0.5]),
        stopping=common_pb2.StoppingParams(max_new_tokens=8, min_new_tokens=1, stop_token_ids=[2, 2**32 - 1]),
        wants_features=True,
        cache_salt=b"salt",
    )
    (opening,) = decode_step(target_pb2.Step(open=[opened])).open
    assert (opening.sequence_id, opening.token_ids.tolist(), opening.prompt_len) == (LARGEST, [3, 4, 5], 2)
    assert opening.cache_salt == b"salt"
    assert (opening.max_new_tokens, opening.min_new_tokens, opening.wants_features) == (8, 1, True)
    assert opening.stop_ids.tolist() == [2, 2**32 - 1]
    assert (opening.sampling.bias_ids.tolist(), opening.sampling.bias_values.tolist()) == ([9], [0.5])
    for name, value in expected.items():
        assert getattr(opening.sampling, name) == value
    assert isinstance(opening.sampling, SamplingParams)


def test_a_results_columns_leave_as_they_are():
    scores = Logprobs(np.array([-0.5, -1.5]), np.array([[1, 2], [3, 4]]), np.array([[-0.25, -0.5], [-1.0, -1.25]]))
    output = StepOutput(
        step_id=8, sequence_ids=ids([LARGEST, 4]), statuses=ints([1, 5]), committed_lens=ints([9, 3]),
        num_accepted=ints([1, 0]), num_tokens=ints([2, 0]), token_ids=ints([7, 8]), finishes=ints([2, 0]),
        errors=["why"], logprobs=[scores], prompt_logprobs=[PromptLogprobs(4, 1, scores.part(0, 1, 0))],
        free_pages=11, kv_lens=ints([8]), cached_lens=ints([4]),
        own_counts=ints([2]), own_log_probs=np.array([-0.5, -2.0], np.float32), own_parents=ints([0, 0]),
        accepted_drafts=ints([2]), forward_ns=1, verify_ns=2, draft_ns=3,
    )  # fmt: skip
    result = target_pb2.StepResult.FromString(encode_result(output).SerializeToString())
    assert (result.step_id, list(result.sequence_ids), list(result.statuses)) == (8, [LARGEST, 4], [1, 5])
    assert (list(result.committed_lens), list(result.num_accepted_drafts)) == ([9, 3], [1, 0])
    assert (list(result.num_tokens), unpacked("token_ids", result.token_ids).tolist(), list(result.finish_reasons)) == (
        [2, 0],
        [7, 8],
        [2, 0],
    )
    assert (list(result.errors), result.free_pages) == (["why"], 11)
    assert (list(result.kv_lens), list(result.cached_lens)) == ([8], [4])
    (told,) = result.logprobs
    assert (list(told.chosen), told.num_top, list(told.top_token_ids)) == ([-0.5, -1.5], 2, [1, 2, 3, 4])
    assert list(told.top_logprobs) == [-0.25, -0.5, -1.0, -1.25]
    (part,) = result.prompt_logprobs
    assert (part.sequence_id, part.start, list(part.logprobs.chosen), part.logprobs.num_top) == (4, 1, [-0.5], 0)
    assert list(result.num_own_drafts) == [2] and np.frombuffer(result.own_log_probs, "<f4").tolist() == [-0.5, -2.0]
    assert unpacked("own_parents", result.own_parents).tolist() == [0, 0]
    assert unpacked("accepted_drafts", result.accepted_drafts).tolist() == [2]
    timings = result.timings
    assert (timings.forward_ns, timings.verify_ns, timings.draft_ns) == (1, 2, 3)


def test_a_result_without_an_accepted_draft_or_an_end_leaves_their_columns_out():
    output = StepOutput(
        step_id=8, sequence_ids=ids([3, 4]), statuses=ints([1, 1]), committed_lens=ints([9, 3]),
        num_accepted=ints([0, 0]), num_tokens=ints([1, 1]), token_ids=ints([7, 8]), finishes=ints([0, 0]),
        kv_lens=ints([]), cached_lens=ints([]), errors=[], logprobs=[], prompt_logprobs=[], free_pages=11,
    )  # fmt: skip
    result = encode_result(output)
    assert not result.num_accepted_drafts and not result.finish_reasons
    assert not result.num_own_drafts and not result.own_log_probs and not result.accepted_drafts
    assert list(result.num_tokens) == [1, 1]
