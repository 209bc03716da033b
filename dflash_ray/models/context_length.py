"""How many tokens a model takes, read from its configuration alone, so that processes without torch know it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Their frequencies change with the longest sequence of a pass, and keys in the cache would keep the older ones.
_FIXED_UP_TO_ORIGINAL = ("dynamic", "longrope", "su")
_WITHIN_MAX_POSITIONS = ("default", "llama3", "proportional", "mrope")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens of a sequence by `max_position_embeddings` and its rope scaling, or None where nothing is said.

    Args:
        config: a Hugging Face configuration as plain values; a `text_config` inside counts in its place.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    if str(config.get("model_type")).startswith("gemma3"):
        return positions  # stated after scaling
    lengths = [_scaled(positions, rope, config) for rope in _rope_parameters(config)]
    return min(lengths, default=positions)


def _rope_parameters(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rope parameters of each kind of layer; full attention alone where it is named, for windows are short."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = {name: values for name, values in rope.items() if isinstance(values, Mapping)}
    if not nested:
        return [rope]
    return [nested["full_attention"]] if "full_attention" in nested else list(nested.values())


def _scaled(positions: int, rope: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if kind in _FIXED_UP_TO_ORIGINAL:
        return min(positions, original or positions)
    if kind in _WITHIN_MAX_POSITIONS:
        return positions
    factor = rope.get("factor")
    if not factor:
        return positions
    return int((original if kind == "yarn" and original else positions) * factor)
