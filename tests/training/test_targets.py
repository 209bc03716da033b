"""Targets with norms, factors, caps and rotary frequencies of their own: training computes what transformers does."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dflash_ray.models.drafter_checkpoint import load_drafter
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.models.target_logits import TargetLogits, norm_weight
from dflash_ray.training.batches import draft_vocabulary
from dflash_ray.training.drafter_setup import drafter_config_values
from dflash_ray.training.fit import fit
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompts import gather_prompts
from dflash_ray.training.regenerate import regenerate
from dflash_ray.training.shards import ShardStore
from dflash_ray.training.tap_sources import OnlineTaps
from tests.tiny import SHAPE, save_tiny_target
from tests.training.conftest import recipe, save_tokenizer, write_prompt_file

FAMILIES = ["llama", "qwen3", "gemma", "gemma2", "gemma3", "granite", "cohere", "cohere2"]
LAST_LAYER = SHAPE["num_hidden_layers"] - 1


@pytest.fixture
def target(request, tmp_path) -> TargetCheckpoint:
    """One of a family, with norms that differ from their start."""
    directory = save_tiny_target(request.param, tmp_path / request.param)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return resolve_target(str(directory))


@pytest.mark.parametrize("target", FAMILIES, indirect=True)
def test_logits_of_the_last_layer_are_those_of_transformers(target):
    model = target.load_model()
    kept: dict[str, torch.Tensor] = {}
    model.get_decoder().layers[-1].register_forward_hook(
        lambda _module, _inputs, out: kept.update(last=out[0] if isinstance(out, tuple) else out)
    )
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
        got = TargetLogits(target)(kept["last"], target.load_head())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", FAMILIES, indirect=True)
def test_a_drafter_embeds_as_its_target_does_and_shapes_its_logits_alike(target):
    shape = recipe(target.path, target.path.parent, drafter={"init_layer_ids": [None]}).drafter
    own = drafter_config_values(shape, target, None)["dflash_config"]
    scale = own.get("input_embedding_scale", 1.0)
    tokens = torch.arange(SHAPE["vocab_size"])[None]
    seen: dict[str, torch.Tensor] = {}
    model = target.load_model()
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _module, inputs: seen.update(rows=inputs[0]))
    with torch.no_grad():
        model(tokens)
    torch.testing.assert_close(F.embedding(tokens, target.load_embedding()) * scale, seen["rows"])
    config = target.config
    assert own.get("final_logit_softcapping", 0.0) == (getattr(config, "final_logit_softcapping", None) or 0.0)
    factors = {"granite": 1 / 3, "cohere": 0.25, "cohere2": 0.25}
    assert own.get("output_multiplier", 1.0) == pytest.approx(factors.get(config.model_type, 1.0))


@pytest.mark.parametrize("target", ["gemma3", "gemma2", "cohere", "granite"], indirect=True)
def test_a_drafter_is_answered_for_distilled_and_saved(target, tmp_path):
    """The engine, the target beside the drafter and the rebuilt logits agree on what the target says."""
    write_prompt_file(tmp_path / "prompts.jsonl", 20)
    shape = {"init_layer_ids": [None, None]}
    keys = {"max_steps": 3, "distillation_weight": 0.5}
    config = recipe(target.path, tmp_path, drafter=shape, regenerate={"with_last_layer": True}, fit=keys)
    gather_prompts(config, LeftOut())
    regenerate(config, LeftOut())
    store = ShardStore(config.shards_dir)
    online = OnlineTaps(store, target, (0, LAST_LAYER), torch.float32, "cpu")([3])[0]
    torch.testing.assert_close(online.float(), store.taps(3, (0, LAST_LAYER)).float(), rtol=0.02, atol=0.02)
    one = store.conversations[3]
    logits = TargetLogits(target)(online[:, -SHAPE["hidden_size"] :].float(), target.load_head())
    said = logits.argmax(-1)[one.prompt_len - 1 :]
    assert (said == one.token_ids[one.prompt_len :]).float().mean() > 0.9  # what the server answered, but for rounding
    fit(config)
    drafter = load_drafter(config.trained_dir, target)
    vocabulary = draft_vocabulary(store.conversations, config.drafter.draft_vocab_size, SHAPE["vocab_size"])
    assert drafter.draft_ids is not None and len(drafter.draft_ids) == len(vocabulary)


@pytest.mark.parametrize("target", ["gemma3"], indirect=True)
def test_of_rotary_frequencies_by_kind_of_layer_a_drafter_takes_those_of_full_attention(target):
    shape = recipe(target.path, target.path.parent, drafter={"init_layer_ids": [None]}).drafter
    values = drafter_config_values(shape, target, None)
    assert values["rope_parameters"] == {"rope_type": "default", "rope_theta": 1_000_000.0}
    stored = json.loads((target.path / "config.json").read_text())["rope_parameters"]
    assert stored["full_attention"]["rope_theta"] == 1_000_000.0 != stored["sliding_attention"]["rope_theta"]


@pytest.mark.parametrize(
    ("target", "refusal"),
    [
        ("gemma2", "post_feedforward_layernorm"),
        ("gemma3", "post_feedforward_layernorm"),
        ("cohere", "lack post_attention_layernorm"),
    ],
    indirect=["target"],
)
def test_layers_of_another_kind_are_no_start_for_a_drafters(target, refusal, tmp_path):
    write_prompt_file(tmp_path / "prompts.jsonl", 20)
    config = recipe(target.path, tmp_path, fit={"max_steps": 0})
    gather_prompts(config, LeftOut())
    regenerate(config, LeftOut())
    with pytest.raises(ValueError, match=f"^drafter.init_layer_ids: the target's layers .*{refusal}.*give null"):
        fit(config)


@pytest.mark.parametrize("target", ["gemma"], indirect=True)
def test_norms_that_are_stored_as_one_plus_their_weight_start_a_drafter_as_what_they_are(target, tmp_path):
    write_prompt_file(tmp_path / "prompts.jsonl", 20)
    config = recipe(target.path, tmp_path, fit={"max_steps": 0})
    gather_prompts(config, LeftOut())
    regenerate(config, LeftOut())
    fit(config)
    weights, base = load_drafter(config.trained_dir, target).weights, target.load_model().get_decoder()
    for ours, theirs in (("norm", base.norm), ("layers.0.input_layernorm", base.layers[1].input_layernorm)):
        expected = 1 + theirs.weight.detach()
        assert torch.equal(norm_weight(theirs), expected)
        assert torch.equal(weights[f"{ours}.weight"], expected.bfloat16())
