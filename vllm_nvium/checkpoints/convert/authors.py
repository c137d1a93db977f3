# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints as the N-vium authors released them (arXiv:2605.13190): Llama weights, exits
beside them, and the experiment's YAML. Only names and the router's temperature change; every other
number is copied.

The router's temperature. The release computes `softmax((c, e) / router_temp)`, so its hazard is
`sigmoid((e - c) / router_temp)`. Our format has no such field: the router's head is linear, so
dividing its weight and bias by `router_temp` gives the same hazards, up to the rounding of the
written dtype. `router_temp: 0` is a decoding choice (leave when p > 0.5), not a law of hazards that
a mixture could have; the learnt hazards are kept as they are. Both are reported as a note.
"""

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_nvium.checkpoints.convert.checkpoint import Source, TensorPlan, check_tensors
from vllm_nvium.checkpoints.convert.dense import make_config, parent_config
from vllm_nvium.errors import UserError, first_line
from vllm_nvium.model_executor.models.checkpoint_layout import expected_shapes
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig

ARCHITECTURE = "NviumModel"
COMPILED_PREFIX = "_orig_mod."  # torch.compile puts it before every name
EXTRAS = (
    "early_norms.",
    "early_adapters.",
    "early_lm_heads.",
    "router_layers.",
    "router_final_norms.",
    "router_heads.",
    "final_adapter.",
)
# Our name -> the release's. `{k}` is the exit, `{j}` the block of a router.
RENAMED = (
    (r"exits\.(\d+)\.norm\.weight", r"early_norms.\1.weight"),
    (r"exits\.(\d+)\.adapter\.fc1\.weight", r"early_adapters.\1.0.weight"),
    (r"exits\.(\d+)\.adapter\.fc2\.weight", r"early_adapters.\1.2.weight"),
    (r"exits\.(\d+)\.lm_head\.weight", r"early_lm_heads.\1.weight"),
    (
        r"exits\.(\d+)\.router\.blocks\.(\d+)\.(fc[12])\.(weight|bias)",
        r"router_layers.\1.layers.\2.\3.\4",
    ),
    (r"exits\.(\d+)\.router\.norm\.weight", r"router_final_norms.\1.weight"),
    (r"exits\.(\d+)\.router\.head\.(weight|bias)", r"router_heads.\1.\2"),
    (r"final_adapter\.fc1\.weight", r"final_adapter.0.weight"),
    (r"final_adapter\.fc2\.weight", r"final_adapter.2.weight"),
)


def is_authors_layout(source: Source) -> bool:
    """Whether this is the authors' layout: by its architecture, or by the norms at its exits."""
    if ARCHITECTURE in (source.config.get("architectures") or ()):
        return True
    return any(name.removeprefix(COMPILED_PREFIX).startswith(EXTRAS[0]) for name in source.shapes)


def find_yaml(folder: Path) -> Path:
    """`.hydra/config.yaml` in the folder, its parent, or its grandparent.

    Raises:
        UserError: there is none.
    """
    folder = folder.resolve()
    for place in (folder, *folder.parents[:2]):
        path = place / ".hydra" / "config.yaml"
        if path.is_file():
            return path
    raise UserError(
        f"{folder} has no .hydra/config.yaml, and neither has its parent or grandparent; the "
        "authors' layout keeps early_layer_idx there."
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The experiment's fields: the mapping that has `early_layer_idx`, at the top or below it.

    Raises:
        UserError: the file is not YAML, or the field is nowhere in it.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({first_line(error)}).") from error
    level = [content]
    while level:
        for mapping in level:
            if isinstance(mapping, dict) and "early_layer_idx" in mapping:
                return mapping
        level = [
            value
            for mapping in level
            if isinstance(mapping, dict)
            for value in mapping.values()
            if isinstance(value, dict)
        ]
    raise UserError(f"{path} has no field early_layer_idx, the layers run at each exit.")


def plan(source: Source) -> tuple[NviumConfig, TensorPlan, list[str]]:
    """The configuration of the N-vium model, how to make its tensors, and notes for the user.

    Raises:
        UserError: the YAML or a tensor is missing, contradictory or of another shape.
    """
    if source.folder is None:
        raise UserError(f"{source.name} is not a folder, and the authors' layout is one.")
    path = find_yaml(source.folder)
    experiment = read_yaml(path)
    source = _without_compiled_prefix(source)
    parent = parent_config(source)
    # Where the YAML is silent the release ties them and notes it in config.json.
    parent.tie_word_embeddings = _tying(
        experiment,
        path,
        "tie_final_to_embeddings",
        bool(source.config.get("tie_word_embeddings", True)),
    )
    exit_layers, exit_head = _exit_layers(experiment, path), _exit_head(experiment, path)
    source = _with_unembeddings(source, len(exit_layers), parent.tie_word_embeddings, exit_head)
    exits = {"exit_layers": exit_layers, "exit_head": exit_head}
    config = make_config({"text_config": parent} | exits | _sizes(source, experiment, path))
    scale, notes = _router_scale(_section(experiment, path, "router"), path)
    theirs = {name: _authors_name(name) for name in (shapes := expected_shapes(config))}
    wanted = {theirs[name]: shape for name, shape in shapes.items()}
    check_tensors(source, wanted, f"{path} and config.json have")
    tensors: TensorPlan = {
        name: partial(_scaled, source, old, scale if ".router.head." in name else 1.0)
        for name, old in theirs.items()
    }
    return config, tensors, notes


def _sizes(source: Source, experiment: dict[str, Any], path: Path) -> dict[str, int]:
    """The fields of `NviumConfig` that size adapters and routers."""
    router = _section(experiment, path, "router")
    first = "router_layers.0.layers.0"
    return {
        "router_num_blocks": _router_blocks(source, router, path),
        "router_intermediate_size": _size(
            router.get("intermediate_size"), source, f"{first}.fc1.weight"
        ),
        "router_hidden_size": _size(router.get("hidden_size"), source, f"{first}.fc2.weight"),
        "exit_adapter_size": _adapter_size(
            source, experiment, path, "early_adapter", "early_adapters.0.0.weight"
        ),
        "final_adapter_size": _adapter_size(
            source, experiment, path, "final_adapter", "final_adapter.0.weight"
        ),
    }


def _without_compiled_prefix(source: Source) -> Source:
    theirs = {name.removeprefix(COMPILED_PREFIX): name for name in source.shapes}
    return _renamed(source, theirs)


def _renamed(source: Source, theirs: dict[str, str]) -> Source:
    """The same source under other names: `theirs` maps a new name to the one in the file."""
    return dataclasses.replace(
        source,
        shapes={new: source.shapes[old] for new, old in theirs.items()},
        load=lambda name: source.load(theirs[name]),
    )


def _exit_layers(fields: dict[str, Any], path: Path) -> list[int]:
    value = fields["early_layer_idx"]
    layers = value if isinstance(value, list) else [value]
    if not layers or not all(type(layer) is int for layer in layers):
        raise UserError(
            f"early_layer_idx in {path} is {value!r}, and an integer or a list of them is needed."
        )
    return sorted(layers)  # the release sorts too: exit k is the k-th from below


def _section(fields: dict[str, Any], path: Path, name: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name} in {path} is {value!r}, and a mapping is needed.")
    return value


def _tying(fields: dict[str, Any], path: Path, name: str, default: bool) -> bool:
    """A switch of the `tying` section; the defaults are the release's own."""
    value = _section(fields, path, "tying").get(name, default)
    if not isinstance(value, bool):
        raise UserError(f"tying.{name} in {path} is {value!r}, and true or false is needed.")
    return value


def _exit_head(fields: dict[str, Any], path: Path) -> str:
    # In this order: the release lets `tie_early_to_final` win when both are set.
    if _tying(fields, path, "tie_early_to_final", False):
        return "final"
    if _tying(fields, path, "tie_early_to_embeddings", False):
        return "embeddings"
    return "own"


def _with_unembeddings(source: Source, num_exits: int, tied: bool, exit_head: str) -> Source:
    """Reduce unembeddings that share one matrix to one tensor, whichever copies were written.

    A safetensors file holds a shared matrix under some of its names only, and which ones depends on
    how it was saved. Copies that are there must agree.
    """
    embeddings, final = "model.embed_tokens.weight", "lm_head.weight"
    early = [f"early_lm_heads.{k}.weight" for k in range(num_exits)]
    groups = {embeddings: [embeddings], final: [final]}
    if tied:
        groups = {embeddings: [embeddings, final]}
    if exit_head == "final":
        groups[embeddings if tied else final] += early
    elif exit_head == "embeddings":
        groups[embeddings] += early
    theirs = {name: name for name in source.shapes}
    for representative, names in groups.items():
        present = [name for name in names if name in source.shapes]
        for other in present[1:]:
            if not _equal(source, present[0], other):
                raise UserError(
                    f"{other} in {source.name} differs from {present[0]}, and the tying fields of "
                    ".hydra/config.yaml say that they are one matrix."
                )
        for name in present:
            theirs.pop(name, None)
        if present:
            theirs[representative] = present[0]
    return _renamed(source, theirs)


def _equal(source: Source, one: str, other: str) -> bool:
    if tuple(source.shapes[one]) != tuple(source.shapes[other]):
        return False
    return torch.equal(source.load(one), source.load(other))


def _router_blocks(source: Source, router: dict[str, Any], path: Path) -> int:
    kind = router.get("router_type", "simple_mlp")
    if kind not in ("simple_mlp", "simple_deep_mlp"):
        raise UserError(
            f"router.router_type in {path} is {kind!r}, and simple_mlp and simple_deep_mlp can be "
            "converted."
        )
    pattern = re.compile(r"router_layers\.0\.layers\.(\d+)\.fc1\.weight")
    found = [match for name in source.shapes if (match := pattern.fullmatch(name))]
    count = 1 + max((int(match[1]) for match in found), default=0)
    declared = router.get("num_layers")
    # The release builds one block for simple_mlp whatever num_layers says.
    allowed = {declared, 1} if kind == "simple_mlp" else {declared}
    if type(declared) is int and count not in allowed:
        raise UserError(
            f"{source.name} has {count} blocks in router_layers.0, and router.num_layers in {path} "
            f"is {declared}."
        )
    return count


def _adapter_size(
    source: Source, fields: dict[str, Any], path: Path, section: str, first: str
) -> int:
    """Inner width of an adapter, 0 when there is none."""
    adapter = _section(fields, path, section)
    present = first in source.shapes
    enabled = adapter.get("enabled", present)
    if not isinstance(enabled, bool):
        raise UserError(f"{section}.enabled in {path} is {enabled!r}, not true or false.")
    if not enabled:
        if present:
            raise UserError(
                f"{source.name} has a tensor {first}, and {section}.enabled in {path} is false."
            )
        return 0
    if not present:
        raise UserError(
            f"{source.name} has no tensor {first}, and {section}.enabled in {path} is true."
        )
    return _size(adapter.get("dim"), source, first)


def _size(declared: Any, source: Source, name: str) -> int:
    """The declared size, or the tensor's own first dimension when the YAML leaves it open."""
    if type(declared) is int and declared > 0:
        return declared
    shape = source.shapes.get(name)
    if shape is None:
        raise UserError(f"{source.name} has no tensor {name}.")
    return int(shape[0])


def _router_scale(router: dict[str, Any], path: Path) -> tuple[float, list[str]]:
    """What to multiply the routers' heads with, and what to tell the user about it."""
    value = router.get("router_temp", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise UserError(f"router.router_temp in {path} is {value!r}, and a number >= 0 is needed.")
    if value == 0:
        return 1.0, [
            "router_temp is 0 (leave when p > 0.5), a choice made while decoding: the learnt "
            "hazards are kept as they are."
        ]
    if value == 1:
        return 1.0, []
    return 1.0 / value, [
        f"router_temp is {value}: every router head is divided by it, which gives the same hazards."
    ]


def _authors_name(name: str) -> str:
    for ours, theirs in RENAMED:
        if re.fullmatch(ours, name):
            return re.sub(ours, theirs, name)
    return name


def _scaled(source: Source, name: str, scale: float) -> torch.Tensor:
    tensor = source.load(name)
    return tensor if scale == 1.0 else tensor.float() * scale
