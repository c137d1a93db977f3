# SPDX-License-Identifier: Apache-2.0
"""The families of models that an N-vium model can be made of, one row each. vLLM's class of
that name and transformers' class of the same name bring the layers, so a row says only what neither
of them tells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_nvium.errors import UserError


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        architecture: the class in vLLM's registry and in transformers. In vLLM its `model` has to
            have `embed_input_ids`, a list `layers` whose members take (positions, hidden, residual)
            and return (hidden, residual), and a `norm` that adds the two.
        only: fields of the family's configuration for which vLLM's layers and transformers' do the
            same with one value alone (a field that is not there counts as that value).
        mixed_windows: whether vLLM runs layers with a sliding window beside layers without one.
        norm_offset: what a norm adds to the weight that is stored for it: `(offset + w) x / |x|`.
    """

    architecture: str
    only: Mapping[str, Any] = field(default_factory=dict)
    mixed_windows: bool = True
    norm_offset: float = 0.0


# model_type of the parent's configuration -> its row.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {"hidden_act": "silu"}),
    "mistral": Family("MistralForCausalLM", {"hidden_act": "silu"}),
    "qwen2": Family("Qwen2ForCausalLM", {"hidden_act": "silu"}, mixed_windows=False),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"hidden_act": "silu", "attention_bias": False}, mixed_windows=False
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "sliding_window": None,
            "shared_expert_intermediate_size": 0,
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
        norm_offset=1.0,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        norm_offset=1.0,
    ),
}


def family_of(model_type: Any, whose: str) -> Family:
    """The row of a family.

    Args:
        whose: what the model type was read from, for the message.

    Raises:
        UserError: there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"model_type of {whose} is {model_type!r}, and N-vium models are made of "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


def check_parent(config: Any) -> None:
    """Refuse a configuration that vLLM's layers and transformers' would not read alike.

    Args:
        config: a configuration of transformers, of a family in the table.

    Raises:
        UserError: one sentence: the field, its value and what would be right.
    """
    family = FAMILIES[config.model_type]
    for name, value in family.only.items():
        found = getattr(config, name, value)
        if found != value:
            raise UserError(
                f"{name} is {found!r}, and layers of the family {config.model_type!r} are served "
                f"with {value!r} only."
            )
    _check_experts(config)
    kinds = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()})
    if len(kinds) > 1 and not family.mixed_windows:
        raise UserError(
            f"layer_types contains {' and '.join(map(repr, kinds))}, and layers of the family "
            f"{config.model_type!r} are served with one kind in all layers only."
        )
    _check_rope(getattr(config, "rope_parameters", None) or {})


def _check_experts(config: Any) -> None:
    """Refuse experts that a token cannot be sent to, in families that have them."""
    experts = getattr(config, "num_experts", None)
    if experts is None:
        return
    if experts < 1:
        raise UserError(f"num_experts is {experts}, and it must be at least 1.")
    if config.num_experts_per_tok > experts:
        raise UserError(
            f"num_experts_per_tok is {config.num_experts_per_tok}, and it must be at most "
            f"num_experts = {experts}."
        )
    every, without = config.decoder_sparse_step, config.mlp_only_layers
    if all(layer in without or (layer + 1) % every for layer in range(config.num_hidden_layers)):
        raise UserError(
            f"decoder_sparse_step is {every} and mlp_only_layers is {without}, so no layer has "
            f"experts, and a {config.model_type} needs one that has."
        )


def _check_rope(parameters: Mapping[str, Any]) -> None:
    """Refuse a rotation of part of a head, which vLLM obeys and transformers' layers do not. The
    parameters are those of all layers, or by kind of layer."""
    for part in (parameters, *(part for part in parameters.values() if isinstance(part, Mapping))):
        factor = part.get("partial_rotary_factor", 1.0)
        if factor != 1.0:
            raise UserError(
                f"rope_parameters.partial_rotary_factor is {factor!r}, and N-vium rotates whole "
                "heads, so it must be 1.0 or absent."
            )
