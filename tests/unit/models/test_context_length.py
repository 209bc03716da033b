"""The context that a configuration states, the same from its file and from transformers' reading of it."""

import json

import pytest
from transformers import AutoConfig

from dflash_ray.config import load_config
from dflash_ray.models.context_length import context_length
from tests.tiny import CONFIGS

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 512),
        (YARN, 2048),
        (YARN | {"original_max_position_embeddings": 400}, 1600),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
            | {"original_max_position_embeddings": 256},
            256,
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 64},
            512,
        ),
    ],
)
def test_rope_scaling_counts_into_the_context_length(tmp_path, rope, expected):
    raw = CONFIGS["qwen2"]().to_dict()
    del raw["rope_parameters"]
    raw |= {"rope_theta": 10000.0} | ({} if rope is None else {"rope_scaling": rope})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert context_length(raw) == expected
    assert context_length({"text_config": raw, "max_position_embeddings": 7}) == expected
    assert context_length(AutoConfig.from_pretrained(tmp_path).to_dict()) == expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_scaling_the_context_is_the_number_of_positions(kind):
    assert context_length(CONFIGS[kind]().to_dict()) == 512


def test_gemma_3_states_its_positions_after_scaling():
    rope = {"rope_type": "linear", "factor": 8.0}
    assert context_length({"model_type": "gemma3_text", "max_position_embeddings": 512, "rope_scaling": rope}) == 512


@pytest.mark.parametrize(
    ("overrides", "context", "limit"),
    [
        ([], 512, 512),
        ([], None, 8192),
        (["model.max_model_len=100"], 512, 100),
        (["target.kv_cache_tokens=64", "target.page_size=10"], 512, 70),
    ],
)
def test_a_sequence_is_limited_by_configuration_model_and_kv_cache(overrides, context, limit):
    assert load_config(None, overrides).sequence_limit(context) == limit
