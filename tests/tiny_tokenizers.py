"""Small tokenizers with the traits of real families, saved as Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ["th", "in", "the", "user", "assistant", "im", "end", "hi", "think"]
SPECIALS = ["<s>", "<|im_start|>", "<|im_end|>"]
QWEN3 = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{{- "<|im_start|>system\\n\\nToday: " + date_string + "\\n" }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n' }}
    {%- generation %}{{ message['content'] | trim }}{% endgeneration %}{{- '<|im_end|>' }}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{%- endfor %}
{{- {'last': messages[-1].content, 'é': 1} | tojson }}"""
DEEPSEEK = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}
{{- '<|User|>' + message.content }}{% else %}{% set content = message.content %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' + content + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""


def save_tokenizer(directory: Path, kind: str = "byte_level", template: Any = QWEN3, **config: Any) -> Path:
    """A directory with tokenizer.json and tokenizer_config.json.

    Args:
        kind: byte_level as Qwen's and Llama 3's, sentencepiece as Llama 2's, or lowercase, whose special tokens match
            after normalization.
        config: more keys of tokenizer_config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _sentencepiece() if kind == "sentencepiece" else _byte_level()
    if kind == "lowercase":
        tokenizer.normalizer = normalizers.Lowercase()
    normalized = kind == "lowercase"
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=normalized) for text in SPECIALS])
    plain = ["<think>", "</think>", "<|User|>", "<|Assistant|>"]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(values | config))
    return directory


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = _merged(alphabet)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocab, merges = _merged(pieces)
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _merged(pieces: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges that make WORDS of single characters, from the left."""
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for word in WORDS:
        for size in range(2, len(word) + 1):
            if word[:size] not in vocab:
                vocab[word[:size]] = len(vocab)
                merges.append((word[: size - 1], word[size - 1]))
    return vocab, merges
