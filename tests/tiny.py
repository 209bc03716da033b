"""Tiny random models, made from their configurations, for tests that need a real target in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
# Granite's factors, none of them 1.
GRANITE = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
# Gemma 3 has other rotary frequencies for its sliding layers; the cap is of the size of these models' logits.
GEMMA3 = {"sliding_window": 9, "query_pre_attn_scalar": 8, "final_logit_softcapping": 10.0, "layer_types": [
    "sliding_attention", "full_attention", "sliding_attention", "full_attention"]}  # fmt: skip
CONFIGS = {
    "llama": lambda **changes: LlamaConfig(**SHAPE | {"tie_word_embeddings": True} | changes),
    "qwen3": lambda **changes: Qwen3Config(**SHAPE | {"tie_word_embeddings": False} | changes),
    "qwen2": lambda **changes: Qwen2Config(**SHAPE | changes),
    "mistral": lambda **changes: MistralConfig(**SHAPE | {"sliding_window": 9} | changes),
    "gemma": lambda **changes: GemmaConfig(**SHAPE | changes),
    "phi3": lambda **changes: Phi3Config(**SHAPE | changes),
    "granite": lambda **changes: GraniteConfig(**SHAPE | GRANITE | changes),
    "cohere": lambda **changes: CohereConfig(**SHAPE | {"logit_scale": 0.25} | changes),
    "cohere2": lambda **changes: Cohere2Config(**SHAPE | {"logit_scale": 0.25, "sliding_window": 9} | changes),
    "gemma3": lambda **changes: Gemma3TextConfig(**SHAPE | GEMMA3 | changes),
    "gemma2": lambda **changes: Gemma2Config(**SHAPE | {"sliding_window": 9, "query_pre_attn_scalar": 8} | changes),
}


def save_tiny_target(kind: str, directory: Path, seed: int = 0, **changes) -> Path:
    """A Hugging Face directory with safetensors; logits are spread enough for varied greedy text.

    `changes` are keys of the configuration.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.0 / (parameter.shape[-1] ** 0.5 * parameter.std()))
            if "embed_tokens" in name:
                parameter.mul_(3.0)
    model.save_pretrained(directory)
    return directory
