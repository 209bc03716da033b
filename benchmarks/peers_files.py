"""What peers.py gives its peers: virtual environments, the model's weights in float32, and prompts as token ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import save_file

from dflash_ray.config import BUILTIN_MODEL
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target

FLOAT32_GGUF = "model-float32.gguf"
HF_FOLDER = "model-float32"
_PROMPTS = Path(__file__).with_name("drafter_prompts.jsonl")


def venv_python(folder: Path, packages: tuple[str, ...], without: tuple[str, ...] = ()) -> Path:
    """The interpreter of an environment with these packages. Only what is compiled already is taken.

    Args:
        without: what they bring along and can do without: the index may have it for another build of torch only.
    """
    python = folder / "bin/python"
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text() != "\n".join(packages):
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *packages]
        subprocess.run(install, check=True, stderr=subprocess.PIPE, text=True)
        if without:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
        installed.write_text("\n".join(packages))
    return python


def write_model(folder: Path) -> None:
    """The builtin model in float32: one GGUF file, and a Hugging Face directory."""
    target = resolve_target(BUILTIN_MODEL)
    if not (folder / FLOAT32_GGUF).exists():
        _write_gguf(target, folder / FLOAT32_GGUF)
    if not (folder / HF_FOLDER / "config.json").exists():
        target.load_tokenizer().save_pretrained(folder / HF_FOLDER)
        _write_safetensors(target, folder / HF_FOLDER)


def _write_safetensors(target: TargetCheckpoint, folder: Path) -> None:
    model = target.load_model()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_gguf(target: TargetCheckpoint, path: Path) -> None:
    assert target.gguf_file is not None
    reader = gguf.GGUFReader(target.path / target.gguf_file)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, str(reader.fields["general.architecture"].contents()))
    for name, stored in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = stored.types[0]
        element = stored.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, stored.contents(), kind, element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tuple(int(n) for n in reversed(tensor.shape))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def prompt_ids(folder: Path, count: int) -> list[list[int]]:
    """Chats of different categories as the model's template renders them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / HF_FOLDER)
    rows = [json.loads(line) for line in _PROMPTS.read_text().splitlines()]
    chats = [row.get("messages") or [{"role": "user", "content": row["prompt"]}] for row in rows]
    chosen = chats[:: max(1, len(chats) // count)][:count]
    return [list(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in chosen]
