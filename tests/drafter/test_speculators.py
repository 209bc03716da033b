"""Drafters in the layout of vllm-project/speculators give the drafts of the published one; others are refused."""

import pytest
import torch

from dflash_ray.models.drafter_checkpoint import load_drafter, save_drafter
from dflash_ray.models.drafter_config import parse_dflash_config
from tests.drafter.drafts import assert_same_drafts
from tests.drafter.published import HIDDEN, VALUES, VOCAB, changed, dflash2, random_weights, save_random, sliding


def save_speculators(directory, values, **changes) -> None:
    """The same weights in the layout of vllm-project/speculators."""
    nested = dict(values["dflash_config"])
    window = {key: values[key] for key in ("layer_types", "sliding_window", "use_sliding_window") if key in values}
    layers = {key: value for key, value in values.items() if key not in ("architectures", "dflash_config", "is_causal")}
    layers = {key: value for key, value in layers.items() if key not in ("block_size", "num_target_layers", *window)}
    config = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash2" if "selector_rank" in nested else "dflash",
        "speculators_version": "0.4.0",
        "speculators_config": {"algorithm": "dflash", "verifier": {"name_or_path": "some/target"}},
        "transformer_layer_config": layers,
        "draft_vocab_size": VOCAB,
        "block_size": values["block_size"],
        "aux_hidden_state_layer_ids": [layer + 1 for layer in nested.pop("target_layer_ids")],
        "sliding_window_non_causal": values.get("is_causal") is False,
        **window,
        **nested,
    }
    weights = random_weights(values)
    for name in ("predecessor_codebook", "successor_codebook"):
        if f"candidate_selector.{name}" in weights:
            weights[f"candidate_selector.{name}.weight"] = weights.pop(f"candidate_selector.{name}")
    save_drafter(directory, config | changes, weights | {"verifier_norm.weight": torch.ones(HIDDEN)})


LAYOUTS = {
    "full attention": changed(),
    "sliding causal": sliding("sliding", "full"),
    "sliding bidirectional": sliding("sliding", "full", is_causal=False),
    "dflash2": dflash2(is_causal=False),
}


@pytest.mark.parametrize("variant", LAYOUTS)
def test_the_speculators_layout_gives_the_drafts_of_the_published_one(variant, target, tmp_path):
    save_random(tmp_path / "published", LAYOUTS[variant])
    save_speculators(tmp_path / "speculators", LAYOUTS[variant])
    mine = load_drafter(tmp_path / "speculators", target).config
    assert mine.target_layer_ids == load_drafter(tmp_path / "published", target).config.target_layer_ids
    assert_same_drafts(tmp_path / "speculators", tmp_path / "published", target)


def test_keys_that_speculators_leaves_out_have_the_defaults_of_the_layers_kind():
    values = {
        "speculators_model_type": "dflash",
        "transformer_layer_config": {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4096},
        "aux_hidden_state_layer_ids": [2, 16],
        "mask_token_id": 5,
    }
    config = parse_dflash_config(values, "test")
    assert (config.vocab_size, config.head_dim, config.block_size) == (32000, 128, 8)
    assert config.target_layer_ids == (1, 15)


def test_a_config_as_speculators_writes_it_is_read_whole():
    values = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"": "config.DFlashSpeculatorConfig"},
        "aux_hidden_state_layer_ids": [2, 11, 20],
        "block_size": 16,
        "draft_vocab_size": 1000,
        "dtype": "bfloat16",
        "mask_token_id": 999,
        "max_anchors": 256,
        "sliding_window_non_causal": True,
        "speculators_config": {"algorithm": "dflash"},
        "speculators_model_type": "dflash",
        "speculators_version": "0.7.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "head_dim": 128,
            "hidden_size": 256,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_window_layers": 2,
            "model_type": "qwen3",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "pad_token_id": 998,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7, "factor": 64.0, "type": "yarn"},
            "sliding_window": 2048,
            "use_cache": False,
            "use_sliding_window": True,
            "vocab_size": 1000,
        },
        "transformers_version": "5.10.2",
    }
    config = parse_dflash_config(values, "test")
    assert config.target_layer_ids == (1, 10, 19)
    assert config.windows == (2048, None) and config.is_causal == (False, False)
    assert config.draft_vocab_size is None, "all of the vocabulary is no reduced vocabulary"
    assert config.rope_factor > 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculators_model_type": "eagle3"}, "speculators_model_type is eagle3"),
        ({"projector_type": "domino"}, "projector_type is domino"),
        ({"sample_from_anchor": True}, "sample_from_anchor is True"),
        ({"target_hidden_size": 96}, "target_hidden_size is 96"),
        ({"aux_hidden_state_layer_ids": None}, "lacks aux_hidden_state_layer_ids"),
        ({"aux_hidden_state_layer_ids": [0, 3]}, r"target_layer_ids \[-1, 2\]"),
        ({"markov_rank": 4}, "the key markov_rank"),
        ({"transformer_layer_config": {"model_type": "gpt2"}}, r"transformer_layer_config\.model_type is gpt2"),
        ({"transformer_layer_config": {"sinks": 1}}, r"the key transformer_layer_config\.sinks"),
    ],
)
def test_other_drafters_in_the_speculators_layout_are_refused_by_name(changes, message, target, tmp_path):
    save_speculators(tmp_path, VALUES, **changes)
    with pytest.raises(ValueError, match=message):
        load_drafter(tmp_path, target)
