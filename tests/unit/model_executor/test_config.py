# SPDX-License-Identifier: Apache-2.0
"""`NviumConfig`: what it fills in, what survives a save, and one sentence for what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from vllm_nvium.model_executor.models.configuration_nvium import (
    NviumConfig,
    default_router_intermediate_size,
)
from vllm_nvium.model_executor.models.families import FAMILIES
from vllm_nvium.model_executor.models.nvium_reference import register_with_transformers

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "exit_layers": [2, 4, 6],
}

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 512,
    },
]


def test_defaults_are_a_valid_model() -> None:
    config = NviumConfig()
    assert config.model_type == "nvium"
    assert config.architectures == ["NviumForCausalLM"]
    assert config.exit_layers == [8, 16, 24]
    assert config.num_heads_of_mixture == 4


def test_sizes_of_the_exits_follow_the_paper() -> None:
    config = NviumConfig(**SMALL | {"hidden_size": 1536, "num_attention_heads": 12})
    assert (config.exit_adapter_size, config.final_adapter_size) == (1536, 1536)
    assert (config.router_intermediate_size, config.router_hidden_size) == (1024, 1536)
    assert default_router_intermediate_size(16) == 32


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_round_trip_is_exact(tmp_path: Path, rope: dict[str, Any]) -> None:
    register_with_transformers()
    before = dict(rope)
    config = NviumConfig(
        **SMALL,
        rope_parameters=rope,
        exit_adapter_size=0,
        final_adapter_size=48,
        router_intermediate_size=32,
        router_hidden_size=80,
        router_num_blocks=2,
        exit_head="own",
        qk_norm=True,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=[2, 3],
    )
    assert rope == before, "the caller's dictionary was changed"
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is NviumConfig
    skip = ("_name_or_path",)
    assert {k: v for k, v in loaded.to_dict().items() if k not in skip} == {
        k: v for k, v in config.to_dict().items() if k not in skip
    }
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["NviumForCausalLM"]
    assert written["exit_layers"] == [2, 4, 6]
    assert "auto_map" not in written


def test_rope_settings_in_the_old_form_are_read() -> None:
    config = NviumConfig(**SMALL, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.parent.rope_parameters["rope_theta"] == 5e5
    assert config.parent.rope_parameters["rope_type"] == "linear"


@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({}, "llama"),
        ({"attention_bias": True, "mlp_bias": True}, "llama"),
        ({"attention_bias": True, "qkv_bias": True}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True, "head_dim": 32}, "qwen3"),
    ],
)
def test_flat_fields_are_those_of_a_family(fields: dict[str, Any], model_type: str) -> None:
    parent = NviumConfig(**SMALL | fields).parent
    assert parent.model_type == model_type
    assert (parent.hidden_size, parent.num_key_value_heads) == (64, 2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_parent_comes_back_as_it_was(tmp_path: Path, model_type: str) -> None:
    register_with_transformers()
    sizes = {name: value for name, value in SMALL.items() if name != "exit_layers"}
    parent = CONFIG_MAPPING[model_type](**sizes, tie_word_embeddings=True, head_dim=16)
    before = parent.to_dict()
    NviumConfig(text_config=parent, exit_layers=[2]).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded.parent) is type(parent)
    assert loaded.get_text_config() is loaded.parent
    skip = ("_name_or_path", "transformers_version")
    assert {k: v for k, v in loaded.parent.to_dict().items() if k not in skip} == {
        k: v for k, v in before.items() if k not in skip
    }


def test_fields_of_the_parent_are_read_and_written_through() -> None:
    config = NviumConfig(**SMALL)
    config.tie_word_embeddings = True
    assert config.parent.tie_word_embeddings is True
    assert (config.vocab_size, config.num_hidden_layers) == (128, 8)


def test_a_window_that_is_not_used_is_forgotten() -> None:
    config = NviumConfig(
        **SMALL,
        sliding_window=4096,
        use_sliding_window=False,
        max_window_layers=4,
        layer_types=["full_attention"] * 8,
    )
    for field in ("sliding_window", "layer_types", "max_window_layers"):
        assert not hasattr(config, field) and not hasattr(config.parent, field)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"exit_layers": [4, 2]}, r"exit_layers is \[4, 2\], .* strictly increasing, as in \[2, 4\]"),
    ({"exit_layers": [2, 2]}, r"exit_layers is \[2, 2\], .* strictly increasing, as in \[2\]"),
    ({"exit_layers": [0, 2]}, r"exit_layers contains 0, .* 1\.\.7"),
    ({"exit_layers": [2, 8]}, r"exit_layers contains 8, .* 1\.\.7"),
    ({"exit_layers": []}, r"exit_layers is empty"),
    ({"exit_layers": 4}, r"exit_layers is 4, and a list of integers"),
    ({"exit_layers": ["2"]}, r"exit_layers is \['2'\], and a list of integers"),
    ({"exit_layers": [True]}, r"exit_layers is \[True\], and a list of integers"),
    ({"exit_layers": [2.0]}, r"exit_layers is \[2\.0\], and a list of integers"),
    ({"exit_adapter_size": -1}, r"exit_adapter_size is -1, .* >= 0"),
    ({"final_adapter_size": 1.5}, r"final_adapter_size is 1\.5, .* >= 0"),
    ({"router_intermediate_size": 0}, r"router_intermediate_size is 0, .* >= 1"),
    ({"router_hidden_size": 0}, r"router_hidden_size is 0, .* >= 1"),
    ({"router_num_blocks": 0}, r"router_num_blocks is 0, .* >= 1"),
    ({"router_num_blocks": None}, r"router_num_blocks is None, .* >= 1"),
    ({"exit_head": "tied"}, r"exit_head is 'tied', .* 'final', 'embeddings', 'own'"),
    ({"hidden_size": "64"}, r"hidden_size is '64', and an integer >= 1"),
    ({"num_hidden_layers": 1}, r"num_hidden_layers is 1, .* >= 2"),
    ({"hidden_act": "gelu"}, r"hidden_act is 'gelu', .* with 'silu' only"),
    ({"num_key_value_heads": 3}, r"num_attention_heads is 4, .* multiple of .* = 3"),
    ({"hidden_size": 66}, r"hidden_size is 66, .* multiple of num_attention_heads = 4"),
    ({"head_dim": 17}, r"even rotary dimension, but got `head_dim`=17"),
    ({"sliding_window": 128}, r"sliding_window is 128, .* null"),
    ({"layer_types": ["sliding_attention"] * 8}, r"layer_types contains 'sliding_attention'"),
    ({"qk_norm": True, "mlp_bias": True}, r"mlp_bias is True, .* qwen3 has no such biases"),
    ({"qkv_bias": True, "mlp_bias": True}, r"mlp_bias is True, .* qwen2 has no such biases"),
    ({"qk_norm": True, "qkv_bias": True}, r"qkv_bias is True, .* qwen3 has no such biases"),
    ({"qk_norm": True, "attention_bias": True}, r"attention_bias is True, .* with False only"),
    ({"qkv_bias": True, "head_dim": 32}, r"head_dim is 32, .* num_attention_heads = 16"),
    ({"text_config": [1]}, r"text_config is \[1\], and an object of fields is needed"),
    ({"text_config": "llama"}, r"text_config is 'llama', and an object"),
    ({"text_config": {"model_type": "gpt2"}}, r"hidden_size.* beside|vocab_size.* beside"),
    (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor is 0\.5, .* 1\.0 or absent",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refusals_are_one_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        NviumConfig(**SMALL | fields)
    text = str(refused.value)
    assert text.endswith(".") and "\n" not in text
