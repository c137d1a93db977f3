# SPDX-License-Identifier: Apache-2.0
"""The configuration of the dense parent inside that of an N-vium checkpoint: as transformers' class
of its family, checked, and made of the flat fields that checkpoints had before there were families.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.families import check_parent, family_of

# Field -> its smallest value.
SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 2,  # an exit needs a layer below and a layer above
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "max_position_embeddings": 1,
    # Of families with experts.
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 1,
    "decoder_sparse_step": 1,
}
# Those that follow from others when they are not given.
MAY_BE_NONE = ("head_dim", "num_key_value_heads")


def parent_of(given: Any, flat: dict[str, Any]) -> PretrainedConfig:
    """The parent's configuration, checked.

    Args:
        given: what `text_config` is: a configuration, its fields, or None.
        flat: the other fields that are not those of the exits; where `text_config` is None they
            describe the parent and are taken out.

    Raises:
        UserError: one sentence: a field, its value and what would be right.
    """
    if not isinstance(given, Mapping | PretrainedConfig | None):
        raise UserError(f"text_config is {given!r}, and an object of fields is needed.")
    for name in DEFAULTS:
        if given is not None and name in flat:
            raise UserError(f"{name} is {flat[name]!r} beside text_config, and belongs into it.")
    if given is None:
        config = _of_flat_fields(flat)
    elif isinstance(given, PretrainedConfig):
        family_of(given.model_type, "text_config")
        config = copy.deepcopy(given)
    else:
        family_of(given.get("model_type"), "text_config")
        config = _make(given["model_type"], given)
    check_sizes(vars(config), SIZES)
    _check_heads(config)
    check_parent(config)
    return config


def head_dim_of(config: PretrainedConfig) -> int:
    """The size of one attention head: a field of its own, or a share of the hidden size."""
    given = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if given is None else given


def logits_cap(config: PretrainedConfig) -> float | None:
    """`c` of a model, dense or N-vium, whose logits are capped; see `capped`."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`c tanh(z / c)` of the products z of states and unembedding, as Gemma 2 does; z where there
    is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def is_int(value: object) -> bool:
    """A true integer: `True` counts as one in Python, but not as a size."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_sizes(fields: Mapping[str, Any], smallest_values: Mapping[str, int]) -> None:
    """Refuse sizes that are not integers or too small; a field that is not there is right.

    Raises:
        UserError: the field, its value and what is needed.
    """
    for name, smallest in smallest_values.items():
        value = fields.get(name, smallest)
        if value is None and name in MAY_BE_NONE:
            continue
        if not is_int(value) or value < smallest:
            raise UserError(f"{name} is {value!r}, and an integer >= {smallest} is needed.")


def _check_heads(config: PretrainedConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads is {heads}, and it must be a multiple of "
            f"num_key_value_heads = {kv_heads}."
        )
    if head_dim_of(config) % 2:
        raise UserError(
            f"head_dim is {head_dim_of(config)}, and rotary embeddings need an even number."
        )


def _make(model_type: str, fields: Mapping[str, Any]) -> PretrainedConfig:
    try:
        # The class fills in missing keys; the caller's dictionaries are not ours to change.
        return CONFIG_MAPPING[model_type](**copy.deepcopy(dict(fields)))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"transformers refuses the fields of a {model_type}: {reason}.") from error


# ---- flat fields

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "qkv_bias": False,
    "qk_norm": False,
    "mlp_bias": False,
}
# The older form of `rope_parameters`.
OLD_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def _of_flat_fields(flat: dict[str, Any]) -> PretrainedConfig:
    """The fields of a Llama; with `qk_norm` (an RMSNorm over each query and key head) they describe
    a Qwen3, and with `qkv_bias` but not `attention_bias` (biases on the q, k and v projections
    only) a Qwen2."""
    _refuse_sliding_window(flat)
    fields = {name: flat.pop(name, default) for name, default in DEFAULTS.items()}
    fields |= {name: flat.pop(name) for name in OLD_ROPE if name in flat}
    check_sizes(fields, SIZES)
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if fields["head_dim"] is None:
        if hidden % heads:
            raise UserError(
                f"hidden_size is {hidden}, and without head_dim it must be a multiple of "
                f"num_attention_heads = {heads}."
            )
        fields["head_dim"] = hidden // heads
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    qkv_bias = bool(fields["qkv_bias"]) and not fields["attention_bias"]
    model_type = "qwen3" if fields["qk_norm"] else "qwen2" if qkv_bias else "llama"
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    _refuse_what_is_lost(fields, model_type, known)
    kept = {name: value for name, value in fields.items() if name in known or name in OLD_ROPE}
    return _make(model_type, kept)


def _refuse_what_is_lost(fields: Mapping[str, Any], model_type: str, known: set[str]) -> None:
    """Refuse combinations that no family has."""
    alone = {"qwen2": ("qkv_bias",), "qwen3": ("qk_norm",), "llama": ("qkv_bias",)}[model_type]
    for name in ("attention_bias", "qkv_bias", "mlp_bias"):
        if fields[name] and name not in known and name not in alone:
            raise UserError(
                f"{name} is {fields[name]!r}, and a model that the other fields make a "
                f"{model_type} has no such biases."
            )
    share = fields["hidden_size"] // fields["num_attention_heads"]
    if "head_dim" not in known and fields["head_dim"] != share:
        raise UserError(
            f"head_dim is {fields['head_dim']}, and in a model that the other fields make a "
            f"{model_type} it is hidden_size / num_attention_heads = {share}."
        )


def _refuse_sliding_window(flat: dict[str, Any]) -> None:
    """Refuse a window in use, and forget one that is not."""
    window = flat.pop("sliding_window", None)
    in_use = flat.pop("use_sliding_window", window is not None)
    layer_types = flat.pop("layer_types", None)
    flat.pop("max_window_layers", None)
    if in_use and window is not None:
        raise UserError(
            f"sliding_window is {window!r}, and without text_config every layer attends to the "
            "whole context, so it must be null (or use_sliding_window false)."
        )
    other = sorted({str(kind) for kind in layer_types or ()} - {"full_attention"})
    if other:
        raise UserError(
            f"layer_types contains {other[0]!r}, and without text_config every layer must be "
            "'full_attention'."
        )
