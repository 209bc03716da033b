"""Conversations as token sequences with a mask on the answer, split by a hash of the prompt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conversation:
    """One prompt with the target's own answer.

    Attributes:
        token_ids: int64 [T], the chat template's prompt followed by the answer.
        prompt_len: rows before the answer.
        source: where the prompt comes from; a category in evaluations.
    """

    token_ids: Tensor
    prompt_len: int
    prompt: str
    source: str


def read_conversations(path: Path, tokenizer: Any, max_length: int) -> list[Conversation]:
    """Reads JSONL. Raises ValueError that names the line at fault."""
    conversations = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            prompt, answer, source = record["prompt"], record["response_ids"], record["source"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: needs prompt, response_ids and source ({error})") from None
        messages = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = [*rendered["input_ids"], *answer][:max_length]
        if len(ids) > len(rendered["input_ids"]) + 1:
            conversations.append(Conversation(torch.tensor(ids), len(rendered["input_ids"]), prompt, source))
    if not conversations:
        raise ValueError(f"{path}: no conversation with an answer")
    return conversations


def split_held_out(conversations: list[Conversation], fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations; the same prompt always falls on the same side."""
    train, held_out = [], []
    for conversation in conversations:
        digest = hashlib.sha256(conversation.prompt.encode()).digest()
        is_held_out = int.from_bytes(digest[:4], "big") < fraction * 2**32
        (held_out if is_held_out else train).append(conversation)
    return train, held_out


def draft_vocabulary(conversations: list[Conversation], size: int, vocab_size: int) -> Tensor:
    """The `size` most frequent answer tokens, ascending; filled with the lowest ids when there are fewer."""
    counts: Counter[int] = Counter()
    for conversation in conversations:
        counts.update(conversation.token_ids[conversation.prompt_len :].tolist())
    chosen = {token for token, _ in counts.most_common(size)}
    for token in range(vocab_size):
        if len(chosen) >= size:
            break
        chosen.add(token)
    return torch.tensor(sorted(chosen))
