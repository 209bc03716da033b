"""The batch decoder gives each sequence the tokens and hidden states that it has alone, with a drafter or without."""

import json

import pytest
import torch

from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.drafter_config import parse_dflash_config
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.config import EngineSection
from dflash_ray.training.decoding import DecodeRequest, local_decoder
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompts import gather_prompts
from dflash_ray.training.regenerate import regenerate
from dflash_ray.training.shards import ShardStore
from tests.drafter.published import changed, random_weights
from tests.training.conftest import recipe

PROMPTS = [[5, 17, 80, 3], [9] * 40, [44, 61], [7, 8, 9, 10, 11, 12, 13]]
NEW_TOKENS = 20
# Room for two of the sequences at a time, and for a third of the longest prompt in a pass.
SETTINGS = EngineSection(max_model_len=64, kv_cache_tokens=144, page_size=8, max_batch_tokens=16)


def decode(target_dir, requests, device="cpu", **options):
    settings = SETTINGS.model_copy(update={"device": device})
    with local_decoder(str(target_dir), settings, **options) as decoder:
        return dict(decoder.run(requests))


def test_tokens_and_taps_are_those_of_each_sequence_alone(target_dir):
    requests = [DecodeRequest(prompt, NEW_TOKENS, wants_taps=True) for prompt in PROMPTS]
    results = decode(target_dir, requests, tap_layer_ids=(0, 2))
    model = resolve_target(str(target_dir)).load_model()
    for index, prompt in enumerate(PROMPTS):
        decoded = results[index]
        ids = torch.tensor([[*prompt, *decoded.token_ids]])
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        assert output.logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == decoded.token_ids
        expected = torch.cat([output.hidden_states[layer + 1][0, :-1] for layer in (0, 2)], dim=-1)
        torch.testing.assert_close(decoded.taps.float(), expected, rtol=0.01, atol=0.01)  # they are bfloat16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tree_width", [1, 3], ids=["chains", "trees"])
def test_a_drafter_changes_no_token(tree_width, temperature, device, target_dir):
    target = resolve_target(str(target_dir))
    values = changed(dflash_config={"target_layer_ids": [0, 2]})
    drafter = DrafterCheckpoint(parse_dflash_config(values, "test"), random_weights(values), "test")
    assert drafter.config.vocab_size == target.config.vocab_size
    plain = [DecodeRequest(prompt, NEW_TOKENS, temperature, seed=3) for prompt in PROMPTS]
    options = {"seed": 3, "draft_tokens": 5, "tree_width": tree_width}
    drafted = [DecodeRequest(prompt, NEW_TOKENS, temperature, **options) for prompt in PROMPTS]
    expected = decode(target_dir, plain, device)
    results = decode(target_dir, drafted, device, drafter=drafter)
    for index, decoded in results.items():
        assert decoded.token_ids == expected[index].token_ids
        assert decoded.stats.num_steps + decoded.stats.num_accepted == NEW_TOKENS - 1
        assert decoded.stats.num_draft_tokens > 0


def test_a_stop_token_ends_a_sequence(target_dir):
    (first,) = decode(target_dir, [DecodeRequest(PROMPTS[0], NEW_TOKENS)]).values()
    stop = first.token_ids[4]
    (stopped,) = decode(target_dir, [DecodeRequest(PROMPTS[0], NEW_TOKENS)], stop_ids=[stop]).values()
    assert stopped.is_stopped and stopped.token_ids == first.token_ids[: first.token_ids.index(stop) + 1]


def test_a_sequence_that_can_never_fit_is_refused(target_dir):
    with pytest.raises(ValueError, match="kv_cache_tokens"):
        decode(target_dir, [DecodeRequest([1] * 60, 100)])


def test_a_sequence_that_the_target_gives_up_costs_no_other_its_tokens(target_dir):
    good = [DecodeRequest(prompt, NEW_TOKENS) for prompt in PROMPTS]
    expected = decode(target_dir, good)
    results = decode(target_dir, [good[0], DecodeRequest([5] * 70, 4), *good[1:]])
    assert "70 tokens" in results.pop(1).error
    assert [one.token_ids for _, one in sorted(results.items())] == [
        one.token_ids for _, one in sorted(expected.items())
    ]
    assert not any(one.error for one in results.values())


def test_answers_and_prompts_end_with_the_context_of_the_target(target_dir, tmp_path):
    """The tiny target holds 512 tokens, whatever engine.max_model_len allows."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "ab" * count}) + "\n" for count in (3, 235, 270)))
    sections = {"engine": {"max_model_len": 1024}, "regenerate": {"max_length": 768}}
    config = recipe(target_dir, tmp_path, **sections, prompts={"near_duplicate_similarity": None})
    left_out = LeftOut()
    gather_prompts(config, left_out)
    regenerate(config, left_out)
    lengths = sorted(len(one.token_ids) for one in ShardStore(config.shards_dir).conversations)
    assert len(lengths) == 2 and lengths[1] == 512
    ((_, reason),) = left_out.rows
    assert reason == "too long for answers within 512 tokens (regenerate.max_length)"
