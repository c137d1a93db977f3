# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose tensors are not those that its configuration describes is refused before an
engine starts, in one sentence that names the tensor, both shapes and the field."""

import cProfile
import json
import pstats
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from starts import refusal, start

from vllm_nvium.model_executor.models.checkpoint_layout import (
    INDEX,
    expected_shapes,
)
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.nvium_reference import NviumForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "exit_layers": [1, 2, 3],
    "exit_adapter_size": 10,
    "final_adapter_size": 12,
    "router_intermediate_size": 14,
    "router_hidden_size": 18,
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"qkv_bias": True, "head_dim": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"qk_norm": True, "exit_layers": [2]},
        {"exit_adapter_size": 0, "final_adapter_size": 0},
        {"router_num_blocks": 3},
        {"exit_head": "own"},
        {"exit_head": "embeddings"},
    ],
    ids=str,
)
def test_is_what_the_reference_model_saves(fields: dict[str, Any]) -> None:
    config = NviumConfig(**(SMALL | fields))
    with torch.device("meta"):
        state = NviumForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert expected_shapes(config) == {name: tuple(value.shape) for name, value in state.items()}


@pytest.fixture
def copy(nvium_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy"
    shutil.copytree(nvium_checkpoint, path)
    return path


State = dict[str, torch.Tensor]


def rewrite(path: Path, change: Callable[[State], None]) -> None:
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def shard(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_torch_state_dict(state, path, max_shard_size="64KB")
    assert len(list(path.glob("*.safetensors"))) > 1


def transpose(name: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = state[name].T.contiguous()

    return change


@pytest.mark.parametrize("sharded", [False, True])
def test_wrong_shape(copy: Path, sharded: bool) -> None:
    rewrite(copy, transpose("exits.1.adapter.fc1.weight"))
    if sharded:
        shard(copy)
    message = refusal(copy)
    assert message.startswith(f"exits.1.adapter.fc1.weight in {copy}")
    assert "has shape [64, 48], but config.json asks for [48, 64]" in message
    assert "(exit_adapter_size = 48, hidden_size = 64)" in message
    assert "correct config.json or convert the checkpoint again" in message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("final_adapter_size", 44, ["final_adapter.fc1.weight (and 1 more)", "[40, 64]", "44"]),
        ("num_key_value_heads", 2, ["k_proj.weight", "num_key_value_heads * head_dim = 2 * 32"]),
        ("intermediate_size", 100, ["mlp.gate_proj.weight", "(intermediate_size = 100)"]),
        ("exit_layers", [1, 2], ["has a tensor exits.2.", "exit_layers = [1, 2]"]),
        ("num_hidden_layers", 5, ["no tensor model.layers.4.", "num_hidden_layers = 5"]),
        ("attention_bias", True, ["no tensor model.layers.0.self_attn.", "attention_bias = True"]),
        ("qkv_bias", True, ["qkv_bias is True beside text_config, and belongs into it"]),
        ("model_type", "phi3", ["model_type of text_config is 'phi3'", "llama, mistral, qwen2"]),
        ("router_num_blocks", 2, ["no tensor exits.0.router.blocks.1.", "router_num_blocks = 2"]),
        ("exit_head", "own", ["no tensor exits.0.lm_head.weight", "exit_head = 'own'"]),
        ("exit_adapter_size", 0, ["has a tensor exits.0.adapter.", "exit_adapter_size = 0"]),
    ],
)
def test_wrong_field(copy: Path, field: str, value: Any, words: list[str]) -> None:
    config = json.loads((copy / "config.json").read_text())
    holder = config["text_config"] if field in config["text_config"] else config
    holder[field] = value
    (copy / "config.json").write_text(json.dumps(config))
    message = refusal(copy)
    assert all(word in message for word in words), message


def test_missing_tensor(copy: Path) -> None:
    rewrite(copy, lambda state: state.pop("lm_head.weight"))
    message = refusal(copy)
    assert f"{copy} has no tensor lm_head.weight" in message
    assert "shape [256, 64] (tie_word_embeddings = False)" in message


def test_unexpected_tensor(copy: Path) -> None:
    rewrite(copy, lambda state: state.update({"model.extra.weight": torch.ones(2, 3)}))
    message = refusal(copy)
    assert "has a tensor model.extra.weight of shape [2, 3]" in message


def test_broken_files(copy: Path) -> None:
    shard(copy)
    (lost, *_) = sorted(copy.glob("*.safetensors"))
    lost.write_bytes(lost.read_bytes()[:50])
    assert f"{lost} cannot be read as safetensors" in refusal(copy)
    lost.unlink()
    assert f"names {lost.name}, which is not in the folder" in refusal(copy)
    (copy / INDEX).write_text("[]")
    assert "is not a valid index" in refusal(copy)


def test_what_vllm_passes_over_is_not_in_the_way(copy: Path) -> None:
    rewrite(copy, lambda state: state.update({"model.rotary_emb.inv_freq": torch.ones(16)}))
    start(copy)


def test_weights_that_are_not_plain_are_not_looked_at(copy: Path) -> None:
    rewrite(copy, transpose("exits.1.adapter.fc1.weight"))
    start(copy, load_format="dummy")
    (copy / "model.safetensors").unlink()
    start(copy)


def test_model_in_the_hub_cache(copy: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(copy, snapshot)
    from vllm_nvium.weights import weight_files

    hub = str(tmp_path / "hub")
    assert weight_files("some/model", None, hub) == [snapshot / "model.safetensors"]
    shard(snapshot)
    assert weight_files("some/model", None, hub) == sorted(snapshot.glob("*.safetensors"))
    next(snapshot.glob("*.safetensors")).unlink()
    assert weight_files("some/model", None, hub) == []  # still to be downloaded
    assert weight_files("no/model", None, hub) == []
    assert weight_files("s3://bucket/model", None, hub) == []


def test_is_fast(tmp_path: Path) -> None:
    """Counted in calls, which no other work on the machine changes; twice the layers, not four
    times the calls."""
    from vllm_nvium.model_executor.models.checkpoint_layout import check_files

    def calls(layers: int) -> int:
        sizes = {"num_hidden_layers": layers, "exit_layers": [12, 24, 36]}
        config = NviumConfig(**(SMALL | sizes))
        state = {name: torch.zeros(shape) for name, shape in expected_shapes(config).items()}
        save_file(state, tmp_path / "model.safetensors")
        with cProfile.Profile() as profile:
            check_files(config, [tmp_path / "model.safetensors"])
        return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]

    few, many = calls(48), calls(96)
    assert few < 200_000 and many < 2.5 * few
