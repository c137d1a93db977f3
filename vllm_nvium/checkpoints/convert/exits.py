# SPDX-License-Identifier: Apache-2.0
"""Trained exits apart from their dense parent: a small folder that holds only what a retrofit
changed, and how parent and folder become an N-vium checkpoint again.

The folder holds `config.json` (the N-vium configuration), `exits.safetensors` (the tensors of exits
and final adapter by their names in the checkpoint, and for each changed matrix `W` of the backbone
its low-rank change, `lora.NAME.A` [r, in] and `lora.NAME.B` [out, r], with
`W = W_parent + scale * B A`), and `training.json` (where they came from).
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_nvium.checkpoints.convert.checkpoint import Source, TensorPlan
from vllm_nvium.checkpoints.convert.dense import (
    OWN,
    check_backbone,
    make_config,
    parent_config,
)
from vllm_nvium.checkpoints.inputs import refusing
from vllm_nvium.errors import UserError
from vllm_nvium.model_executor.models.checkpoint_layout import Shape, expected_shapes
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig

WEIGHTS = "exits.safetensors"
RECORD = "training.json"
# Of the dense parent, because the same configuration may hold other weights.
FINGERPRINTED = "model.embed_tokens.weight"
EXIT_FIELDS = (
    "exit_layers", "exit_adapter_size", "final_adapter_size", "router_intermediate_size",
    "router_hidden_size", "router_num_blocks", "exit_head", "greedy_margin",
)  # fmt: skip
# Fields of a parent that say nothing about what it computes.
NO_MATTER = ("architectures", "dtype", "transformers_version", "use_cache", "_name_or_path")


def fingerprint(source: Source) -> str:
    """Tells parents of one shape apart: a digest of the embeddings, whatever dtype they are in."""
    embeddings = source.load(FINGERPRINTED).to(torch.bfloat16).contiguous()
    return hashlib.sha256(embeddings.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def write_exits(
    folder: Path,
    config: NviumConfig,
    tensors: Mapping[str, torch.Tensor],
    lora_scale: float,
    record: Mapping[str, Any],
) -> None:
    """Writes the folder described above; `tensors` in the dtype they shall have.

    Args:
        folder: exists and is empty (see `staged_folder`).
        lora_scale: the `scale` of all low-rank changes.
        record: goes to `training.json`.
    """
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt", "lora_scale": repr(lora_scale)},
    )
    config.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(dict(record), indent=2) + "\n")


def plan(source: Source, folder: Path) -> tuple[NviumConfig, TensorPlan, list[str]]:
    """The N-vium model that a dense parent and a folder of exits make together.

    Returns:
        its configuration, how to make each of its tensors, and notes for the user.

    Raises:
        UserError: the folder cannot be read, or belongs to a model of another shape.
    """
    weights, scale = _read_weights(folder)
    config = _read_config(folder)
    exits = {name: getattr(config, name) for name in EXIT_FIELDS}
    # Whatever the folder leaves open in the parent's own fields is filled in as it is for a parent.
    theirs = make_config({"text_config": parent_config(source)} | exits).parent
    ours = config.parent.to_dict()
    for name, value in theirs.to_dict().items():
        if ours.get(name) != value and name not in NO_MATTER:
            raise UserError(
                f"--exits {folder} was made for a model whose {name} is {ours.get(name)!r}, and "
                f"{source.name} has {value!r}."
            )
    shapes = expected_shapes(config)
    check_backbone(source, shapes)
    changed = {name.removeprefix("lora.")[:-2] for name in weights if name.startswith("lora.")}
    if unknown := sorted(changed - {name for name, shape in shapes.items() if len(shape) == 2}):
        raise UserError(
            f"{folder / WEIGHTS} changes {unknown[0]}, and the model has no such matrix."
        )
    _check_shapes(weights, shapes, changed, folder)
    tensors: TensorPlan = {}
    for name in shapes:
        if name.startswith(OWN):
            tensors[name] = partial(weights.__getitem__, name)
        elif name in changed:
            down, up = weights[f"lora.{name}.A"], weights[f"lora.{name}.B"]
            tensors[name] = partial(_changed, source, name, down, up, scale)
        else:
            tensors[name] = partial(source.load, name)
    return config, tensors, _notes(source, folder)


def _check_shapes(
    weights: Mapping[str, torch.Tensor],
    shapes: Mapping[str, Shape],
    changed: set[str],
    folder: Path,
) -> None:
    """Refuses tensors that are not those of the configuration beside them."""
    needed = {name: shape for name, shape in shapes.items() if name.startswith(OWN)}
    for name in sorted(changed):
        outputs, inputs = shapes[name]
        down = weights.get(f"lora.{name}.A")
        rank = 0 if down is None or down.ndim == 0 else len(down)
        needed |= {f"lora.{name}.A": (rank, inputs), f"lora.{name}.B": (outputs, rank)}
    for name, shape in needed.items():
        if name not in weights:
            raise UserError(f"{folder / WEIGHTS} has no tensor {name}.")
        if (found := tuple(weights[name].shape)) != tuple(shape):
            raise UserError(
                f"{folder / WEIGHTS} has {name} of shape {found}, and its config.json needs "
                f"{tuple(shape)}: give config.json and {WEIGHTS} of one run."
            )


def _read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    with (
        refusing(f"--exits is {str(folder)!r}, and {WEIGHTS} in it cannot be read"),
        safe_open(folder / WEIGHTS, framework="pt") as file,
    ):
        scale = float((file.metadata() or {}).get("lora_scale", "1.0"))
        return {name: file.get_tensor(name) for name in file.keys()}, scale  # noqa: SIM118


def _read_config(folder: Path) -> NviumConfig:
    what = f"--exits is {str(folder)!r}, and config.json in it is not that of an N-vium model"
    with refusing(what):
        return NviumConfig(**json.loads((folder / "config.json").read_text()))


def _notes(source: Source, folder: Path) -> list[str]:
    try:
        expected = json.loads((folder / RECORD).read_text()).get("parent_fingerprint")
    except (OSError, ValueError, AttributeError):
        expected = None
    if expected and expected != fingerprint(source):
        return [
            f"{source.name} has other weights than the model that {folder} was trained on, so "
            "expect worse text; evaluate it with vllm-nvium eval."
        ]
    return []


def _changed(
    source: Source, name: str, down: torch.Tensor, up: torch.Tensor, scale: float
) -> torch.Tensor:
    """`W + scale * B A` in float32: `[out, in]` from A `[r, in]` and B `[out, r]`."""
    return source.load(name).float() + scale * (up.float() @ down.float())
