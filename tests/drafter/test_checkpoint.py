"""What loads, in one file or in shards, with the whole vocabulary or a part of it.

What is refused, with the name of the fault and its remedy.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_ray.models.drafter_checkpoint import load_drafter, save_drafter
from tests.drafter.drafts import assert_same_drafts, draft
from tests.drafter.published import (
    HIDDEN,
    VALUES,
    VOCAB,
    changed,
    dflash2,
    random_weights,
    save_random,
    sliding,
)


def save_shards(directory, values, num_files=3) -> None:
    weights = random_weights(values)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(values))
    weight_map = {}
    for i, name in enumerate(sorted(weights)):
        weight_map[name] = f"model-{i % num_files + 1:05}-of-{num_files:05}.safetensors"
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_that_an_index_names_load_like_one_file(target, tmp_path):
    save_random(tmp_path / "whole", VALUES)
    save_shards(tmp_path / "shards", VALUES)
    assert_same_drafts(tmp_path / "shards", tmp_path / "whole", target)


@pytest.mark.parametrize("values", [changed(), dflash2()], ids=["dflash", "dflash2"])
@pytest.mark.parametrize("has_own_head", [False, True])
def test_a_reduced_vocabulary_drafts_the_tokens_it_has_and_names_them_as_the_target_does(
    values, has_own_head, target, tmp_path
):
    chosen = torch.arange(5, VOCAB, 9)
    weights = random_weights(values | {"draft_vocab_size": len(chosen)})
    full_head = torch.randn(VOCAB, HIDDEN) if has_own_head else target.load_head()
    reduced = weights | {"d2t": chosen - torch.arange(len(chosen))}
    if has_own_head:
        reduced["lm_head.weight"] = full_head[chosen].clone()
    save_drafter(tmp_path / "reduced", values | {"draft_vocab_size": len(chosen)}, reduced)
    proposal = draft(tmp_path / "reduced", target)
    assert set(proposal.candidate_ids.flatten().tolist()) <= set(chosen.tolist())
    if "conv_kernel_size" in values["dflash_config"]:
        return
    save_drafter(tmp_path / "full", values, weights | {"lm_head.weight": full_head})
    whole = draft(tmp_path / "full", target)
    expected = torch.empty(5, VOCAB).scatter_(-1, whole.candidate_ids, whole.logprobs)[:, chosen].log_softmax(-1)
    mine = torch.empty(5, VOCAB).scatter_(-1, proposal.candidate_ids, proposal.logprobs)[:, chosen]
    assert torch.allclose(mine, expected, atol=1e-4)


def nested(**changes):
    return changed(dflash_config=changes)


FAULTS = {
    "a block without drafts": (nested(block_size=1), "block_size is 1"),
    "a mask that is no number": (nested(mask_token_id="<mask>"), "mask_token_id is '<mask>'; it must be a number"),
    "a scale that is no number": (nested(output_multiplier=[2]), r"output_multiplier is \[2\]"),
    "layer ids that are no list": (nested(target_layer_ids=3), "target_layer_ids is 3"),
    "a section that is no mapping": (VALUES | {"dflash_config": [1]}, r"dflash_config is \[1\]"),
    "another hidden size": (changed(hidden_size=64), "hidden_size is 64 but the target has 48"),
    "another vocabulary": (changed(vocab_size=97), "vocab_size is 97 but the target has 96"),
    "layer ids out of range": (nested(target_layer_ids=[1, 40]), r"target_layer_ids \[1, 40\].* has 7"),
    "negative layer id": (nested(target_layer_ids=[-1, 2]), r"target_layer_ids \[-1, 2\]"),
    "mask outside the vocabulary": (nested(mask_token_id=900), "mask_token_id 900"),
    "no mask": (nested(mask_token_id=None), "lacks mask_token_id; add"),
    "another tokenizer": (nested(tokenizer_hash="0123456789abcdef"), "tokenizer_hash is 0123456789abcdef"),
    "another architecture": (changed(architectures=["EagleModel"]), r"architectures is \['EagleModel'\]"),
    "another activation": (changed(hidden_act="gelu"), "hidden_act is gelu; only silu"),
    "a shape of other weights": (changed(intermediate_size=32), r"mlp.*\(64, 48\) but config.json says \(32, 48\)"),
    "an unknown key": (changed(attention_sinks=4), "the key attention_sinks, .* remove it"),
    "an unknown drafter key": (nested(use_swa=True), r"the key dflash_config\.use_swa"),
    "a window without its size": (sliding("sliding", "full") | {"sliding_window": None}, "sliding_window is None; add"),
    "another kind of layer": (sliding("sliding", "chunked"), "layer_types has chunked_attention"),
    "too few layer types": (sliding("full", "full") | {"layer_types": ["full_attention"]}, "layer_types"),
    "a size that is no number": (changed(num_hidden_layers="two"), "num_hidden_layers"),
    "rope that depends on the length": (
        changed(rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope_type is dynamic; .*yarn",
    ),
    "rope without its factor": (changed(rope_scaling={"type": "yarn"}), "factor"),
    "dflash2 without its sizes": (dflash2(rank=None), "lacks selector_rank"),
    "groups that do not divide": (dflash2(group=5), "conv_group_size is 5"),
    "more candidates than a slot may have": (dflash2(top_k=257), "selector_top_k is 257"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_config_that_does_not_fit_is_refused_by_name(fault, target, tmp_path, monkeypatch):
    values, message = FAULTS[fault]
    monkeypatch.setitem(vars(target), "tokenizer_hash", "fedcba9876543210")
    save_drafter(tmp_path, values, random_weights(dflash2() if "selector_rank" in str(values) else VALUES))
    with pytest.raises(ValueError, match=message):
        load_drafter(tmp_path, target)


def test_a_tokenizer_hash_that_is_the_targets_is_accepted(target, tmp_path, monkeypatch):
    monkeypatch.setitem(vars(target), "tokenizer_hash", "fedcba9876543210")
    save_random(tmp_path, nested(tokenizer_hash="fedcba9876543210"))
    load_drafter(tmp_path, target)


def test_keys_that_transformers_adds_are_harmless(target, tmp_path):
    extra = {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "torch_dtype": "bfloat16", "use_cache": True}
    save_random(tmp_path, changed(rope_scaling=None, layer_types=None, is_causal=None, **extra))
    load_drafter(tmp_path, target)


def break_file(directory, how):
    file = directory / "model.safetensors"
    match how:
        case "truncated":
            file.write_bytes(file.read_bytes()[:500])
        case "cut in the data":
            file.write_bytes(file.read_bytes()[:-40])
        case "not safetensors":
            file.write_bytes(b"\x80\x04pickle" * 40)
        case "no weights":
            file.unlink()
        case "a tensor is missing":
            weights = load_file(file)
            del weights["fc.weight"]
            save_file(weights, file)
        case "a tensor too many":
            save_file(load_file(file) | {"layers.9.norm": torch.ones(1)}, file)
        case "pickled mask embedding":
            torch.save(torch.ones(HIDDEN), directory / "mask_embedding.pt")
        case "config is not JSON":
            (directory / "config.json").write_text("{")
        case "config is a list":
            (directory / "config.json").write_text("[]")
        case "no config":
            (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors is truncated or corrupt .* copy"),
        ("cut in the data", "model.safetensors is truncated or corrupt"),
        ("not safetensors", "model.safetensors is truncated or corrupt"),
        ("no weights", r"no \*\.safetensors"),
        ("a tensor is missing", r"missing \['fc\.weight'\]"),
        ("a tensor too many", r"unknown \['layers\.9\.norm'\]"),
        ("pickled mask embedding", r"\['mask_embedding\.pt'\] are pickles, .* convert"),
        ("config is not JSON", r"config\.json is not JSON"),
        ("config is a list", r"config\.json must be a mapping"),
        ("no config", r"config\.json is missing"),
    ],
)
def test_files_that_cannot_be_used_are_named(how, message, target, tmp_path):
    save_random(tmp_path, VALUES)
    break_file(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        load_drafter(tmp_path, target)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"fc.weight": "model-00007.safetensors"}, "names model-00007.safetensors, which is not in the directory"),
        ({"fc.weight": "../model.safetensors"}, "names ../model.safetensors"),
        (None, "no readable weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_directory_is_refused(weight_map, message, target, tmp_path):
    save_shards(tmp_path / "shards", VALUES)
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        load_drafter(tmp_path / "shards", target)


def test_a_vocabulary_map_that_leaves_the_target_is_refused(target, tmp_path):
    save_drafter(tmp_path, VALUES | {"draft_vocab_size": 3}, random_weights(VALUES) | {"d2t": torch.tensor([0, 5, 94])})
    with pytest.raises(ValueError, match="d2t"):
        load_drafter(tmp_path, target)
