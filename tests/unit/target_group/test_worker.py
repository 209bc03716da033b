"""What a rank says of itself."""

import json
import shutil

from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.target_group.worker import model_fingerprint
from tests.tiny import save_tiny_target


def test_a_model_is_another_when_its_weights_its_configuration_or_its_arithmetic_change(tmp_path):
    save_tiny_target("llama", tmp_path / "a")
    save_tiny_target("llama", tmp_path / "other_weights", seed=1)
    for name in ("copy", "other_config"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    file = tmp_path / "other_config/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))

    def fingerprint(name: str, dtype: str = "float32") -> str:
        return model_fingerprint(resolve_target(str(tmp_path / name)), dtype)

    assert fingerprint("copy") == fingerprint("a")
    others = {fingerprint("other_weights"), fingerprint("other_config"), fingerprint("a", "bfloat16")}
    assert len(others) == 3 and fingerprint("a") not in others
