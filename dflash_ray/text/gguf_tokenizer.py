"""The tokenizer that a GGUF file describes, built by transformers; what it does not know is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer

from dflash_ray.models.gguf_reader import GgufFile
from dflash_ray.text.token_sizes import byte_alphabet

_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4  # token types in the metadata
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
# GPT-2's split, which is what transformers falls back on. SmolLM2's files are read so too: its drafters learned them.
_GPT2_SPLITS = frozenset(("exaone4", "gpt-2", "jais", "mpt", "olmo", "phi-2", "smollm", "trillion"))
# GPT-2's split after every digit stands alone.
_DIGIT_SPLITS = frozenset(("codeshell", "command-r", "exaone", "minerva-7b", "refact", "starcoder"))
# Whole words of the vocabulary are tokens without merges, and BOS is added unless the file says otherwise.
_WHOLE_WORD_SPLITS = frozenset(
    ("falcon-h1", "falcon3", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral", "tekken")
)
_READ_WITH_SCALING = ("gpt-oss",)


@dataclass(frozen=True)
class GgufTokenizer:
    """Metadata of one file.

    Attributes:
        metadata: values by their key without `tokenizer.`.
        architecture: as llama.cpp names it.
        context_length: tokens of a sequence, None where the file does not say.
    """

    file: Path
    architecture: str
    metadata: dict[str, Any]
    context_length: int | None

    @property
    def chat_templates(self) -> dict[str, str]:
        prefix = "chat_template"
        return {
            key.removeprefix(prefix).removeprefix(".") or "default": value
            for key, value in self.metadata.items()
            if key == prefix or key.startswith(f"{prefix}.")
        }

    @property
    def special_texts(self) -> dict[str, str]:
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {name: self.metadata.get(f"ggml.{key}_token_id") for name, key in names.items()}
        return {f"{name}_token": self._tokens[index] for name, index in ids.items() if index is not None}

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text, a turn or a message."""
        ids = (self.metadata.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return [int(index) for index in ids if index is not None]

    def build_tokenizer(self) -> Tokenizer:
        """Raises ValueError where this file needs a tokenizer.json beside it."""
        kind, split = self.metadata.get("ggml.model"), self.metadata.get("ggml.pre")
        beside = f"put the model's tokenizer.json beside {self.file.name}"
        if kind not in (_BYTE_LEVEL, _SENTENCEPIECE):
            raise ValueError(f"model.path: tokenizer.ggml.model {kind!r} is not read here; {beside}")
        known = _GPT2_SPLITS | _DIGIT_SPLITS | GGUF_PRE_TOKENIZER_SPLITS.keys()
        if kind == _BYTE_LEVEL and split not in known:
            raise ValueError(f"model.path: tokenizer.ggml.pre {split!r} is not among {sorted(known)}; {beside}")
        tokenizer, _ = convert_gguf_tokenizer(self.architecture, self._for_transformers(kind, split))
        if kind == _BYTE_LEVEL and split in _DIGIT_SPLITS:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        if kind == _BYTE_LEVEL and split in _WHOLE_WORD_SPLITS:
            tokenizer.model.ignore_merges = True
        if kind == _BYTE_LEVEL:
            tokenizer = self._as_stated(tokenizer)
        tokenizer.post_processor = self._post_processor(kind, split)
        return tokenizer

    def _as_stated(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokens of the file and no others.

        transformers adds GPT-2's `<|endoftext|>` to every vocabulary, and misses markers such as DeepSeek's
        `<｜User｜>`, which the file holds as text and not in the byte alphabet.
        """
        alphabet = byte_alphabet()
        markers = {
            token: type_ == _CONTROL_TOKEN
            for token, type_ in zip(self._tokens, self._types, strict=True)
            if type_ in (_CONTROL_TOKEN, _USER_DEFINED_TOKEN)
            and token.startswith("<")
            and token.endswith(">")
            and not set(token) <= set(alphabet.values())
        }
        state = json.loads(tokenizer.to_str())
        vocab = state["model"]["vocab"]
        for token in markers:
            vocab[token] = vocab.pop("".join(alphabet[byte] for byte in token.encode()))
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(self._tokens)]
        tokenizer = Tokenizer.from_str(json.dumps(state))
        for token, is_control in markers.items():
            added = AddedToken(token, special=is_control, normalized=False)
            (tokenizer.add_special_tokens if is_control else tokenizer.add_tokens)([added])
        return tokenizer

    @property
    def _tokens(self) -> list[str]:
        tokens: list[str] = self.metadata["ggml.tokens"]
        return tokens

    @property
    def _types(self) -> list[int]:
        types: list[int] = self.metadata["ggml.token_type"]
        return types

    def _for_transformers(self, kind: str, split: str | None) -> dict[str, Any]:
        names = ("tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id")
        values = {name: self.metadata[f"ggml.{name}"] for name in names if f"ggml.{name}" in self.metadata}
        return {**values, "tokenizer_type": kind, "pre_tokenizer_type": split}

    def _post_processor(self, kind: str, split: str | None) -> Any:
        """BOS and EOS where the file, or llama.cpp in its place, adds them."""
        adds_bos = self.metadata.get("ggml.add_bos_token", kind == _SENTENCEPIECE or split in _WHOLE_WORD_SPLITS)
        adds = {"bos": adds_bos, "eos": self.metadata.get("ggml.add_eos_token", False)}
        used = {
            name: (self.special_texts[f"{name}_token"], int(self.metadata[f"ggml.{name}_token_id"]))
            for name, is_added in adds.items()
            if is_added and f"{name}_token" in self.special_texts
        }
        parts = [f"{used['bos'][0]}"] if "bos" in used else []
        parts += ["$A", *([used["eos"][0]] if "eos" in used else [])]
        return processors.TemplateProcessing(single=parts, special_tokens=list(used.values()))


def load_gguf(file: Path) -> GgufTokenizer:
    """Reads the metadata, no tensors. Raises ValueError for rotary scaling, which the target would leave out."""
    fields = GgufFile(file).fields
    architecture = str(fields["general.architecture"].contents())
    scaling = fields.get(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none" and architecture not in _READ_WITH_SCALING:
        raise ValueError(
            f"model.path: {file.name} scales its positions (rope.scaling.type {scaling.contents()!r}), which "
            "transformers reads from config.json only; use the model's safetensors directory"
        )
    metadata = {
        key.removeprefix("tokenizer."): value.contents()
        for key, value in fields.items()
        if key.startswith("tokenizer.")
    }
    length = fields.get(f"{architecture}.context_length")
    return GgufTokenizer(file, architecture, metadata, None if length is None else int(length.contents()))
