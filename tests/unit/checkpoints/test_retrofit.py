# SPDX-License-Identifier: Apache-2.0
"""What a run starts from, and what it leaves behind that did not start from a dense model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny_models import SIZES, dense_config, make_nvium, save_tokenizer
from vllm_nvium.checkpoints.convert.exits import OWN
from vllm_nvium.checkpoints.train.options import TrainOptions, flag_of
from vllm_nvium.checkpoints.train.retrofit import (
    choose_trainable,
    finish,
    open_start,
    trainable_state,
)
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig

Tensors = dict[str, torch.Tensor]


def finished(folder: Path, trains: bool = True, **options: Any) -> tuple[Tensors, Tensors]:
    """What a run trains when each such weight has grown by 1, and the weights that it writes."""
    given = TrainOptions(out=str(folder / "run"), **options)
    start = open_start(given, folder / "run")
    trained = choose_trainable(start.model, given)
    state = trainable_state(trained)
    for tensor in state.values():
        tensor += float(trains)
    finish(start, trained, given, folder / "run", {})
    return state, load_file(folder / "run" / "model" / "model.safetensors")


def test_routers_start_by_the_seed(dense_checkpoint: Path, tmp_path: Path) -> None:
    name = "exits.0.router.blocks.0.fc1.weight"

    def drawn(seed: int, folder: Path) -> torch.Tensor:
        options = TrainOptions(model=str(dense_checkpoint), exit_layers=[2], seed=seed)
        return open_start(options, folder).model.state_dict()[name]

    first, again, other = (drawn(seed, tmp_path / f"{i}") for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("field", "value"), [("exit_layers", [1]), ("adapter_size", 8)], ids=["exits", "adapters"]
)
def test_exits_that_a_start_has_already(
    field: str, value: Any, nvium_checkpoint: Path, tmp_path: Path
) -> None:
    options = TrainOptions(model=str(nvium_checkpoint), **{field: value})
    with pytest.raises(UserError, match=f"^{flag_of(field)} is .* has its exits already"):
        open_start(options, tmp_path)


def dtypes(folder: Path) -> tuple[str, str]:
    config = json.loads((folder / "run" / "model" / "config.json").read_text())
    return config["dtype"], config["text_config"]["dtype"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["exits", "lora", "full"])
def test_an_nvium_start_keeps_its_dtype_and_what_was_not_trained(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make_nvium(tmp_path / "start", tied=True, dtype=dtype)
    before = load_file(tmp_path / "start" / "model.safetensors")
    state, after = finished(tmp_path, model=str(tmp_path / "start"), method=method)
    assert after.keys() == before.keys() and "lm_head.weight" not in after
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert dtypes(tmp_path) == (str(dtype).removeprefix("torch."),) * 2
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    if method == "full":
        assert changed == before.keys()
        return
    own = {name for name in before if name.startswith(OWN)}
    projections = {name for name in before if name.endswith("_proj.weight")}
    assert changed == own | (projections if method == "lora" else set())
    if method == "lora":
        name = "model.layers.1.mlp.up_proj"
        down, up = (state[f"base_model.model.{name}.lora_{side}.default.weight"] for side in "AB")
        expected = before[f"{name}.weight"].float() + 2 * up @ down
        torch.testing.assert_close(after[f"{name}.weight"], expected.to(dtype))


def test_experts_keep_their_names(tmp_path: Path) -> None:
    """transformers trains them as one tensor."""
    make_nvium(tmp_path / "start", parent=dense_config("qwen3_moe"))
    before = load_file(tmp_path / "start" / "model.safetensors")
    options = {"model": str(tmp_path / "start"), "method": "full", "dtype": "float32"}
    _, after = finished(tmp_path, **options)
    assert after.keys() == before.keys()
    # Everything is trained, so nothing may have been found in the start's folder.
    assert not [name for name in before if torch.equal(after[name], before[name])]


@pytest.mark.parametrize("tied", [True, False])
def test_from_scratch_the_configuration_says_what_was_written(tied: bool, tmp_path: Path) -> None:
    fields = SIZES | {"exit_layers": [2], "intermediate_size": 64, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(NviumConfig(**fields).to_dict()))
    save_tokenizer(tmp_path, SIZES["vocab_size"])
    options = {"model": str(tmp_path), "tokenizer": str(tmp_path), "method": "scratch"}
    _, after = finished(tmp_path, **options)
    assert ("lm_head.weight" in after) == (not tied)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert dtypes(tmp_path) == ("bfloat16", "bfloat16")
