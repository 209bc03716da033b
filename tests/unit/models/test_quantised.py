"""Quantised checkpoints are refused by name before any of their weights is read."""

import json

import pytest

from dflash_ray.models.target_checkpoint import resolve_target
from tests.tiny import save_tiny_target

SETTINGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "zero_point": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "a method that it does not name": {"bits": 4},
}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", SETTINGS)
def test_a_quantised_checkpoint_is_refused_by_name_and_none_of_its_weights_is_read(method, key, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", key: SETTINGS[method]}))
    (tmp_path / "model.safetensors").write_bytes(b"no such file can be read")
    with pytest.raises(
        ValueError, match=rf"model\.path: .* is quantised with {method} .*not served; give the directory"
    ):
        resolve_target(str(tmp_path))


def test_a_checkpoint_that_says_it_is_not_quantised_is_served(tmp_path):
    save_tiny_target("llama", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": None}))
    assert resolve_target(str(tmp_path)).load_model() is not None
