"""How much text one token can stand for: what is longer cannot fit, and need not be tokenized to be refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SHRINK = {"Prepend": 1, "Replace": 1, "NFC": 4}  # bytes that a normalizer may make one of, at most


@dataclass(frozen=True)
class TokenSizes:
    """Bounds of one tokenizer.

    Attributes:
        max_bytes: of UTF-8 in a token, before normalization.
        vanishing: bytes that the vocabulary lacks, of which the tokenizer makes nothing.
    """

    max_bytes: int
    vanishing: bytes

    def min_tokens(self, texts: Iterable[str]) -> int:
        """Fewer tokens than this cannot hold the texts."""
        return sum(len(text.encode().translate(None, self.vanishing)) for text in texts) // self.max_bytes


def token_sizes(tokenizer: Tokenizer) -> TokenSizes | None:
    """None where a token may stand for any length of text."""
    model = tokenizer.model
    added = tokenizer.get_added_tokens_decoder().values()
    steps = _steps(tokenizer.normalizer, "normalizers")
    splits = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    drops_text = (
        type(model).__name__ != "BPE"
        or (model.unk_token is not None and not model.byte_fallback)
        or any(token.lstrip or token.rstrip for token in added)  # white space, in any amount
        or any(step["type"] not in _SHRINK or not _keeps_length(step) for step in steps)
        or any("Removed" in split.values() or "Whitespace" in split["type"] for split in splits)
    )
    if drops_text:
        return None
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if any(split["type"] == "ByteLevel" for split in splits):
        longest = max(map(len, vocab))  # a character of the vocabulary is a byte
        vanishing = bytes(byte for byte, character in byte_alphabet().items() if character not in vocab)
    elif model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        longest, vanishing = max(len(token.encode()) for token in vocab), b""
    else:
        return None
    shrink = max((_SHRINK[step["type"]] for step in steps), default=1)
    return TokenSizes(shrink * max(longest, *(len(token.content.encode()) for token in added), 1), vanishing)


def byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    characters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    return characters


def _steps(component: Any, member: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, in the form of tokenizer.json."""
    if component is None:
        return []
    values = json.loads(component.__getstate__())
    return list(values[member]) if values["type"] == "Sequence" else [values]


def _keeps_length(step: dict[str, Any]) -> bool:
    return step["type"] != "Replace" or bool(step["pattern"] == {"String": " "} and step["content"])
