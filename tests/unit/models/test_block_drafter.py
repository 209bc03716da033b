"""Our DFlash network is the published reference's, step by step, for every kind of layer."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

from dflash_ray.models.block_drafter import BlockDrafter, ContextGap
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint, load_drafter, parse_dflash_config, save_drafter
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from tests.tiny import SHAPE, save_tiny_target

VALUES = {
    "architectures": ["DFlashDraftModel"],
    "hidden_size": SHAPE["hidden_size"],
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "vocab_size": SHAPE["vocab_size"],
    "max_position_embeddings": 512,
    "num_target_layers": SHAPE["num_hidden_layers"],
    "block_size": 6,
    "dflash_config": {"target_layer_ids": [1, 2], "mask_token_id": 90},
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9, "use_sliding_window": True}
VARIANTS = {
    "full": {},
    "sliding and causal": SLIDING,
    "sliding, bidirectional": SLIDING | {"is_causal": False},
    "causal everywhere": {"is_causal": True},
    "biases": {"attention_bias": True},
    "embedding scale, multiplier and soft cap": {
        "dflash_config": VALUES["dflash_config"]
        | {"input_embedding_scale": 1.7, "output_multiplier": 0.6, "final_logit_softcapping": 4.0}
    },
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TargetCheckpoint:
    return resolve_target(str(save_tiny_target("llama", tmp_path_factory.mktemp("target"))))


def random_weights(values: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    from dflash_ray.models.dflash import ContextProjector, DflashNetwork

    config = parse_dflash_config(values, "test")
    generator = torch.Generator().manual_seed(seed)
    names = {**ContextProjector(config).state_dict(), **DflashNetwork(config).state_dict()}
    return {
        name: torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
        + (1.0 if "norm" in name else 0.0)
        for name, tensor in names.items()
    }


def checkpoint_of(values: dict) -> DrafterCheckpoint:
    return DrafterCheckpoint(parse_dflash_config(values, "test"), random_weights(values), "test")


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_equal_the_reference_over_steps_with_cropping(variant, target):
    reference = pytest.importorskip("dflash.model", reason="the reference package dflash is not installed")
    values = VALUES | VARIANTS[variant]
    config = Qwen3Config(**{k: v for k, v in values.items() if k != "architectures"})
    config._attn_implementation = "sdpa"
    theirs = reference.DFlashDraftModel(config).eval()
    theirs.load_state_dict(random_weights(values))
    checkpoint = checkpoint_of(values)
    ours = BlockDrafter(checkpoint, target)
    projector = checkpoint.build_projector()
    model = target.load_model()
    cache = reference._make_cache(config)
    generator = torch.Generator().manual_seed(7)
    scale = checkpoint.config.input_embedding_scale
    ours.open(1)
    start = 0
    for rows in (11, 1, 4, 6, 2):
        taps = torch.randn(1, rows, 2 * SHAPE["hidden_size"], generator=generator)
        anchor = int(torch.randint(0, 90, (1,), generator=generator))
        block = torch.tensor([[anchor, *[90] * 5]])
        with torch.inference_mode():
            hidden = theirs(
                target_hidden=taps,
                noise_embedding=reference._raw_input_embeddings(model, block, scale),
                position_ids=torch.arange(start, start + rows + 6)[None],
                past_key_values=cache,
                use_cache=True,
            )
            reference._crop_to(cache, start + rows)
            logits = theirs.compute_logits(hidden[:, 1:], model.lm_head)[0]
            ours.extend(1, start, projector(taps[0]))
        start += rows
        proposal = ours.propose([1], [anchor], [5], num_candidates=4)[0]
        expected, ids = logits.log_softmax(-1).topk(4)
        assert torch.allclose(proposal.logprobs, expected, atol=1e-4)
        assert torch.equal(proposal.candidate_ids, ids)


def test_context_that_comes_in_pieces_or_twice_is_the_same_context(target):
    drafter = BlockDrafter(checkpoint_of(VALUES), target)
    features = torch.randn(30, SHAPE["hidden_size"])
    drafter.open(1)
    drafter.open(2)
    drafter.extend(1, 0, features)
    for start, stop in ((0, 7), (5, 8), (8, 8), (8, 29), (0, 30)):
        drafter.extend(2, start, features[start:stop])
    one, other = drafter.propose([1, 2], [3, 3], [5, 5], num_candidates=2)
    assert torch.allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_sequences_drafted_together_get_the_drafts_they_get_alone(target):
    drafter = BlockDrafter(checkpoint_of(VALUES), target)
    for session, rows in ((1, 5), (2, 19), (3, 300)):
        drafter.open(session)
        drafter.extend(session, 0, torch.randn(rows, SHAPE["hidden_size"]))
    together = drafter.propose([1, 2, 3], [4, 5, 6], [5, 2, 3], num_candidates=1)
    for session, anchor, count, proposal in zip((1, 2, 3), (4, 5, 6), (5, 2, 3), together, strict=True):
        alone = drafter.propose([session], [anchor], [count], num_candidates=1)[0]
        assert torch.equal(alone.candidate_ids, proposal.candidate_ids)
        assert proposal.candidate_ids.shape == (count, 1)


def test_a_gap_in_the_context_is_reported_with_what_is_held(target):
    drafter = BlockDrafter(checkpoint_of(VALUES), target)
    drafter.open(1)
    drafter.extend(1, 0, torch.randn(4, SHAPE["hidden_size"]))
    with pytest.raises(ContextGap) as raised:
        drafter.extend(1, 6, torch.randn(1, SHAPE["hidden_size"]))
    assert raised.value.have == 4


def test_the_longest_unused_session_leaves_when_the_context_is_full(target):
    drafter = BlockDrafter(checkpoint_of(VALUES), target, max_context_tokens=50)
    for session in (1, 2, 3):
        drafter.open(session)
        drafter.extend(session, 0, torch.randn(20, SHAPE["hidden_size"]))
    assert [drafter.context_len(session) for session in (1, 2, 3)] == [0, 20, 20]


def test_a_reduced_draft_vocabulary_proposes_target_ids(target):
    values = VALUES | {"draft_vocab_size": 10}
    chosen = torch.arange(5, 95, 9)
    full = checkpoint_of(values)
    weights = full.weights | {"d2t": chosen - torch.arange(10)}
    drafter = BlockDrafter(dataclasses.replace(full, weights=weights), target)
    drafter.open(1)
    drafter.extend(1, 0, torch.randn(8, SHAPE["hidden_size"]))
    assert set(drafter.propose([1], [3], [5], 4)[0].candidate_ids.flatten().tolist()) <= set(chosen.tolist())


def test_a_saved_drafter_loads_and_misfits_are_named(target, tmp_path):
    weights = random_weights(VALUES)
    save_drafter(tmp_path / "good", VALUES, weights)
    assert load_drafter(tmp_path / "good", target).config.target_layer_ids == (1, 2)

    for name, change, words in (
        ("hidden", {"hidden_size": 64}, "hidden_size"),
        ("layers", {"dflash_config": {"target_layer_ids": [1, 40], "mask_token_id": 90}}, "target_layer_ids"),
        ("mask", {"dflash_config": {"target_layer_ids": [1, 2], "mask_token_id": 900}}, "mask_token_id"),
        ("kind", {"architectures": ["EagleModel"]}, "architectures"),
        ("shape", {"intermediate_size": 32}, "mlp"),
    ):
        save_drafter(tmp_path / name, VALUES | change, weights)
        with pytest.raises(ValueError, match=words):
            load_drafter(tmp_path / name, target)

    save_drafter(tmp_path / "short", VALUES, weights)
    file = tmp_path / "short/model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load_drafter(tmp_path / "short", target)

    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/config.json").write_text((tmp_path / "good/config.json").read_text())
    (tmp_path / "pickle/model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickles"):
        load_drafter(tmp_path / "pickle", target)


def test_a_missing_tensor_is_named(target, tmp_path):
    weights = random_weights(VALUES)
    save_drafter(tmp_path, VALUES, weights)
    del weights["fc.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"fc\.weight"):
        load_drafter(tmp_path, target)
