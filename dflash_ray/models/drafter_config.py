"""A drafter's config.json as a DflashConfig: the published z-lab layout, and the one of vllm-project/speculators.

The z-lab layout is read as its reference reads it: a Qwen3Config, with the drafter's own keys in `dflash_config` or,
failing that, at the top level. A key that is neither understood nor known to be harmless is refused, because a drafter
that runs with other numerics than it was trained with only shows as a low acceptance length.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from dflash_ray.kernels.draft_ops import MOST_CANDIDATES
from dflash_ray.models.dflash import DflashConfig
from dflash_ray.models.dflash2 import Dflash2Config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURE = "DFlashDraftModel"
ARCHITECTURE_2 = "DFlash2DraftModel"
ARCHITECTURE_2_FACTORISED = "DFlash2FactorisedDraftModel"  # of our own: codebooks from the target's embedding and head
_ARCHITECTURES = (ARCHITECTURE, ARCHITECTURE_2, ARCHITECTURE_2_FACTORISED)

_DFLASH2_KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_DRAFTER_KEYS = frozenset({
    "block_size", "final_logit_softcapping", "input_embedding_scale", "mask_token_id", "num_target_layers",
    "output_multiplier", "target_layer_ids", "tokenizer_hash", *_DFLASH2_KEYS,
})  # fmt: skip
_LAYER_KEYS = frozenset({
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "max_window_layers", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings",
    "use_sliding_window", "vocab_size",
})  # fmt: skip
# Written by transformers or by trainers, without effect on a drafter's forward pass.
_HARMLESS_KEYS = frozenset({
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "auto_map",
    "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "loss_decay_gamma", "max_anchors", "model_type", "name_or_path", "num_anchors",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "selector_loss_weight", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
_PUBLISHED_KEYS = _LAYER_KEYS | _HARMLESS_KEYS | _DRAFTER_KEYS | {"dflash_config", "draft_vocab_size", "is_causal"}

_SPECULATORS_LAYER_TYPES = ("qwen3", "llama")  # whose defaults fill a transformer_layer_config
_SPECULATORS_WINDOW_KEYS = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")
_SPECULATORS_HARMLESS_KEYS = _HARMLESS_KEYS | {
    "auf", "config_class", "emb_dim", "embed_requires_grad", "gru_hidden_dim", "has_no_defaults_at_init",
    "lambda_base_decay_ratio", "lambda_base_start", "mlp_bias", "norm_before_residual", "pure_draft_prefix_len",
    "speculators_config", "speculators_version", "tie_word_embeddings",
}  # fmt: skip
# Switches of other drafters of that project, and the value that leaves a DFlash drafter.
_SPECULATORS_SWITCHES = {"projector_type": "dflash", "sample_from_anchor": False, "shift_label": False}
_SPECULATORS_KEYS = _SPECULATORS_HARMLESS_KEYS | {
    "aux_hidden_state_layer_ids", "block_size", "draft_vocab_size", "mask_token_id", "sliding_window_non_causal",
    "speculators_model_type", "target_hidden_size", "transformer_layer_config",
    *_SPECULATORS_SWITCHES, *_SPECULATORS_WINDOW_KEYS, *_DFLASH2_KEYS,
}  # fmt: skip

# Their frequencies change with the length of the text, so context keys that are held would become wrong.
_LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")


def parse_dflash_config(values: dict[str, Any], where: str) -> DflashConfig:
    """The drafter's shape. Raises ValueError that names the key at fault and what to do about it.

    Args:
        values: config.json.
        where: what the messages begin with.
    """
    if "speculators_model_type" in values:
        return _parse_speculators(values, where)
    if values.get("architectures") not in [[name] for name in _ARCHITECTURES]:
        raise ValueError(
            f"{where}: architectures is {values.get('architectures')};"
            f" one of {', '.join(f'[{name!r}]' for name in _ARCHITECTURES)} is supported"
        )
    _check_keys(values, _PUBLISHED_KEYS, "", where)
    nested = values.get("dflash_config") or {}
    _check_keys(nested, _DRAFTER_KEYS, "dflash_config.", where)
    own = {key: nested.get(key, values.get(key)) for key in _DRAFTER_KEYS}
    own["draft_vocab_size"] = values.get("draft_vocab_size")
    layers = {key: values[key] for key in _LAYER_KEYS & values.keys()}
    if "sliding_attention" in (values.get("layer_types") or ()):
        layers["use_sliding_window"] = True  # some checkpoints leave out what their layer types say
    config = _layer_config("qwen3", layers, where)
    return _assemble(config, own, values.get("is_causal"), values["architectures"][0], where)


def _parse_speculators(values: dict[str, Any], where: str) -> DflashConfig:
    """The layout of vllm-project/speculators: the layers' shape nested, tap ids counted from the embedding."""
    kind = values["speculators_model_type"]
    if kind not in ("dflash", "dflash2"):
        raise ValueError(f"{where}: speculators_model_type is {kind}; dflash and dflash2 are supported")
    _check_keys(values, _SPECULATORS_KEYS, "", where)
    for key, wanted in _SPECULATORS_SWITCHES.items():
        if values.get(key) not in (None, wanted):
            raise ValueError(f"{where}: {key} is {values[key]}, another kind of drafter; only {wanted} is supported")
    nested = values.get("transformer_layer_config") or {}
    _check_keys(nested, _LAYER_KEYS | _SPECULATORS_HARMLESS_KEYS, "transformer_layer_config.", where)
    model_type = nested.get("model_type", "qwen3")
    if model_type not in _SPECULATORS_LAYER_TYPES:
        raise ValueError(
            f"{where}: transformer_layer_config.model_type is {model_type}; {_SPECULATORS_LAYER_TYPES} are supported"
        )
    layers = {key: nested[key] for key in _LAYER_KEYS & nested.keys()}
    layers |= {key: values[key] for key in _SPECULATORS_WINDOW_KEYS if key in values}
    config = _layer_config(model_type, layers, where)
    if values.get("target_hidden_size") not in (None, config.hidden_size):
        raise ValueError(
            f"{where}: target_hidden_size is {values['target_hidden_size']} but the drafter's hidden_size is"
            f" {config.hidden_size}; drafters of another width than their target are not supported"
        )
    ids = values.get("aux_hidden_state_layer_ids")
    if not ids:
        raise ValueError(f"{where}: config.json lacks aux_hidden_state_layer_ids; add those that it was trained with")
    own = dict.fromkeys(_DRAFTER_KEYS) | {key: values.get(key) for key in ("mask_token_id", *_DFLASH2_KEYS)}
    own["block_size"] = values.get("block_size", 8)
    own["target_layer_ids"] = [layer - 1 for layer in ids]
    rows = values.get("draft_vocab_size")
    own["draft_vocab_size"] = None if rows == config.vocab_size else rows
    is_causal = False if values.get("sliding_window_non_causal", kind == "dflash2") else None
    return _assemble(config, own, is_causal, ARCHITECTURE_2 if kind == "dflash2" else ARCHITECTURE, where)


def _check_keys(values: Any, known: frozenset[str], prefix: str, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: config.json: {prefix.rstrip('.')} is {values!r}; it must be a mapping of keys")
    for key in sorted(values.keys() - known):
        raise ValueError(
            f"{where}: config.json has the key {prefix}{key}, which this release does not know and which may change"
            " what the drafter computes; remove it if it has no effect, or use a release that knows it"
        )


def _layer_config(model_type: str, layers: dict[str, Any], where: str) -> PretrainedConfig:
    """The layers' shape with transformers' defaults and checks."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        # transformers fills in the dictionaries that it is given.
        return AutoConfig.for_model(model_type, **copy.deepcopy(layers))
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: config.json cannot be read: {error}") from None


def _assemble(
    config: PretrainedConfig, own: dict[str, Any], is_causal: bool | None, architecture: str, where: str
) -> DflashConfig:
    """Joins the layers' shape and the drafter's own keys, of which those that are absent are None."""

    def read(key: str, default: float | None = None) -> Any:
        value = default if own[key] is None else own[key]
        if value is None:
            raise ValueError(f"{where}: config.json lacks {key}; add the value that the drafter was trained with")
        kinds = (int, float) if isinstance(default, float) else int
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"{where}: {key} is {value!r}; it must be a number")
        return value

    if config.hidden_act != "silu":
        raise ValueError(f"{where}: hidden_act is {config.hidden_act}; only silu is supported")
    num_layers = config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    window = getattr(config, "sliding_window", None)
    for kind in layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"{where}: layer_types has {kind}; full_attention and sliding_attention are supported")
        if kind == "sliding_attention" and not window:
            raise ValueError(f"{where}: layer_types has sliding_attention but sliding_window is {window}; add its size")
    is_sliding = [kind == "sliding_attention" for kind in layer_types]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies, rope_factor = _rope(config, head_dim, where)
    layer_ids = own["target_layer_ids"] or _default_layer_ids(read("num_target_layers"), num_layers)
    if not isinstance(layer_ids, list) or not all(isinstance(layer, int) for layer in layer_ids):
        raise ValueError(f"{where}: target_layer_ids is {layer_ids!r}; it must be a list of layers of the target")
    block_size = read("block_size", 16)
    if block_size < 2:
        raise ValueError(f"{where}: block_size is {block_size}; a block is the anchor and at least one drafted token")
    dflash2 = None
    if architecture != ARCHITECTURE:
        sizes = {key: read(key) for key in _DFLASH2_KEYS}
        for key, size in sizes.items():
            if size < 1 or (key == "conv_group_size" and config.hidden_size % size):
                raise ValueError(f"{where}: {key} is {size}; it must be positive, and a group size divide hidden_size")
        if sizes["selector_top_k"] > MOST_CANDIDATES:
            raise ValueError(f"{where}: selector_top_k is {sizes['selector_top_k']}; {MOST_CANDIDATES} are the most")
        dflash2 = Dflash2Config(**sizes, is_factorised=architecture == ARCHITECTURE_2_FACTORISED)
    return DflashConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_frequencies=frequencies,
        rope_factor=rope_factor,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        block_size=block_size,
        mask_token_id=read("mask_token_id"),
        target_layer_ids=tuple(layer_ids),
        is_causal=tuple(is_sliding if is_causal is None else [bool(is_causal)] * num_layers),
        windows=tuple(window if sliding else None for sliding in is_sliding),
        attention_bias=bool(config.attention_bias),
        input_embedding_scale=float(read("input_embedding_scale", 1.0)),
        output_multiplier=float(read("output_multiplier", 1.0)),
        final_logit_softcapping=float(read("final_logit_softcapping", 0.0)),
        draft_vocab_size=own["draft_vocab_size"],
        ties_embeddings=bool(config.tie_word_embeddings),
        tokenizer_hash=own["tokenizer_hash"],
        dflash2=dflash2,
    )


def _rope(config: PretrainedConfig, head_dim: int, where: str) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies and the factor of cos and sin, as transformers computes them for this rope_type."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters.get("rope_type")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0
    if kind not in ROPE_INIT_FUNCTIONS or kind in _LENGTH_DEPENDENT_ROPES:
        supported = ["default", *sorted(ROPE_INIT_FUNCTIONS.keys() - set(_LENGTH_DEPENDENT_ROPES))]
        raise ValueError(f"{where}: rope_type is {kind}; {supported} are supported")
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config)
    if len(frequencies) != head_dim // 2:
        raise ValueError(f"{where}: partial_rotary_factor leaves a part of each head unrotated; only 1 is supported")
    return tuple(frequencies.tolist()), float(factor)


def _default_layer_ids(num_target_layers: int, num_layers: int) -> list[int]:
    """The reference's rule for checkpoints that do not state their taps."""
    if num_layers == 1:
        return [num_target_layers // 2]
    return [round(1 + i * (num_target_layers - 4) / (num_layers - 1)) for i in range(num_layers)]
