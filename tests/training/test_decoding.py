"""The batch decoder gives each sequence the tokens and hidden states that it has alone, with a drafter or without."""

import pytest
import torch

from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint
from dflash_ray.models.drafter_config import parse_dflash_config
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.config import EngineSection
from dflash_ray.training.decoding import DecodeRequest, local_decoder
from tests.drafter.published import changed, random_weights

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
def test_a_drafter_changes_no_token(temperature, device, target_dir):
    target = resolve_target(str(target_dir))
    values = changed(dflash_config={"target_layer_ids": [0, 2]})
    drafter = DrafterCheckpoint(parse_dflash_config(values, "test"), random_weights(values), "test")
    assert drafter.config.vocab_size == target.config.vocab_size
    plain = [DecodeRequest(prompt, NEW_TOKENS, temperature, seed=3) for prompt in PROMPTS]
    drafted = [DecodeRequest(prompt, NEW_TOKENS, temperature, seed=3, draft_tokens=5) for prompt in PROMPTS]
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
