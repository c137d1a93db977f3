# SPDX-License-Identifier: Apache-2.0
"""The trained exits that come with the package: they are whole, small, and what the demo puts into
its model. What they are worth is measured by the commands in their README.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vllm_nvium.checkpoints.convert.exits import OWN
from vllm_nvium.cli.demo import checkpoint as demo
from vllm_nvium.model_executor.models.checkpoint_layout import expected_shapes
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig

LARGEST = 20_000_000  # bytes


def test_they_are_whole_and_small() -> None:
    config = NviumConfig(**json.loads((demo.TRAINED_EXITS / "config.json").read_text()))
    shapes = expected_shapes(config)
    path = demo.TRAINED_EXITS / "exits.safetensors"
    assert path.stat().st_size < LARGEST
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    own = {name: shape for name, shape in shapes.items() if name.startswith(OWN)}
    assert {name: tuple(found[name].shape) for name in own} == own
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all(), name
        if name not in own:
            changed, side = name.removeprefix("lora.").rsplit(".", 1)
            assert side in "AB" and changed in shapes, name
    # Routers that answer the same for every token would have learned nothing.
    assert all(found[f"exits.{k}.router.head.weight"].any() for k in range(len(config.exit_layers)))


def test_their_record_says_how_they_were_made() -> None:
    record = json.loads((demo.TRAINED_EXITS / "training.json").read_text())
    assert record["parent"] == demo.SMOLLM2.model
    assert record["calibration"]["reached"]
    assert record["options"]["seed"] == 0 and record["steps"] > 0
    # Where it was made says nothing about it.
    assert not any(path.startswith("/") for path in record["options"]["text"])
    assert "vllm-nvium eval" in (demo.TRAINED_EXITS / "README.md").read_text()


def test_the_demo_puts_them_into_its_model(
    tmp_path: Path, dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(demo.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(demo, "dense_smollm2", lambda: dense_checkpoint)
    asked: list[Path | None] = []

    def convert(
        dense: Path, out: Path, options: object = None, *, exits: Path | None = None
    ) -> list[str]:
        asked.append(exits)
        out.mkdir()
        (out / "config.json").write_text("{}")
        return []

    monkeypatch.setattr(demo, "convert", convert)
    made = demo.prepare("").nvium
    assert made.parent == tmp_path and "trained" in made.name
    assert demo.prepare("").nvium == made and asked == [demo.TRAINED_EXITS]
    # Asked for other exits, it makes untrained ones.
    assert demo.prepare("", exits=[1, 2]).nvium != made and asked[1] is None
