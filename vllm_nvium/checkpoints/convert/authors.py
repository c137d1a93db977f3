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
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, ValidationError

from vllm_nvium.checkpoints.convert.checkpoint import Source, TensorPlan, check_tensors
from vllm_nvium.checkpoints.convert.dense import make_config, parent_config
from vllm_nvium.errors import UserError, first_line
from vllm_nvium.model_executor.models.checkpoint_layout import expected_shapes
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig

ARCHITECTURE = "NviumModel"
COMPILED_PREFIX = "_orig_mod."  # torch.compile puts it before every name
NORMS = "early_norms."
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


class Router(BaseModel):
    """Sizes that are left open, or are references of Hydra, are those of the tensors."""

    router_type: Literal["simple_mlp", "simple_deep_mlp"] = "simple_mlp"
    hidden_size: Any = None
    intermediate_size: Any = None
    num_layers: Any = None
    router_temp: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] = 1.0


class Adapter(BaseModel):
    """See `Router`."""

    enabled: StrictBool | None = None
    dim: Any = None


class Tying(BaseModel):
    """The defaults are the release's own; that of the final head stands in config.json."""

    tie_final_to_embeddings: StrictBool | None = None
    tie_early_to_final: StrictBool = False
    tie_early_to_embeddings: StrictBool = False

    @property
    def exit_head(self) -> str:
        """In this order: the release lets `tie_early_to_final` win when both are set."""
        if self.tie_early_to_final:
            return "final"
        return "embeddings" if self.tie_early_to_embeddings else "own"


class Experiment(BaseModel):
    """What is read of the YAML; sections may be missing."""

    early_layer_idx: Annotated[list[StrictInt], Field(min_length=1)]
    router: Router = Router()
    early_adapter: Adapter = Adapter()
    final_adapter: Adapter = Adapter()
    tying: Tying = Tying()


def is_authors_layout(source: Source) -> bool:
    """Whether this is the authors' layout: by its architecture, or by the norms at its exits."""
    if ARCHITECTURE in (source.config.get("architectures") or ()):
        return True
    return any(name.removeprefix(COMPILED_PREFIX).startswith(NORMS) for name in source.shapes)


def find_yaml(folder: Path) -> Path:
    """`.hydra/config.yaml` in the folder, its parent, or its grandparent; refuses where there is
    none."""
    folder = folder.resolve()
    for place in (folder, *folder.parents[:2]):
        path = place / ".hydra" / "config.yaml"
        if path.is_file():
            return path
    raise UserError(
        f"{folder} has no .hydra/config.yaml, and neither has its parent or grandparent; the "
        "authors' layout keeps early_layer_idx there."
    )


def read_yaml(path: Path) -> Experiment:
    """The experiment's fields: the mapping that has `early_layer_idx`, at the top or below it.

    Raises:
        UserError: the file is not YAML, or a field cannot be used or is nowhere in it.
    """
    import yaml

    try:
        level = [yaml.safe_load(path.read_text())]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({first_line(error)}).") from error
    while level := [mapping for mapping in level if isinstance(mapping, dict)]:
        for mapping in level:
            if "early_layer_idx" in mapping:
                return _experiment(mapping, path)
        level = [value for mapping in level for value in mapping.values()]
    raise UserError(f"{path} has no field early_layer_idx, the layers run at each exit.")


def _experiment(fields: dict[str, Any], path: Path) -> Experiment:
    layers = fields["early_layer_idx"]
    given = {name: value for name, value in fields.items() if value is not None}
    given["early_layer_idx"] = layers if isinstance(layers, list) else [layers]
    try:
        found = Experiment.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name, said = ".".join(map(str, first["loc"])), first["msg"]
        raise UserError(
            f"{name} in {path} is {first['input']!r}: {said[0].lower()}{said[1:]}."
        ) from None
    found.early_layer_idx.sort()  # the release sorts too: exit k is the k-th from below
    return found


def plan(source: Source) -> tuple[NviumConfig, TensorPlan, list[str]]:
    """The configuration of the N-vium model, how to make its tensors, and notes for the user.

    Raises:
        UserError: the YAML or a tensor is missing, contradictory or of another shape.
    """
    path = find_yaml(source.path)
    experiment = read_yaml(path)
    plain = {name.removeprefix(COMPILED_PREFIX): name for name in source.shapes}
    source = _renamed(source, plain)
    parent, tying = parent_config(source), experiment.tying
    tied = tying.tie_final_to_embeddings
    # Where the YAML is silent the release ties them and notes it in config.json.
    if tied is None:
        tied = bool(source.config.get("tie_word_embeddings", True))
    parent.tie_word_embeddings = tied
    exit_layers = experiment.early_layer_idx
    source = _with_unembeddings(source, len(exit_layers), tied, tying.exit_head)
    exits = {"exit_layers": exit_layers, "exit_head": tying.exit_head}
    config = make_config({"text_config": parent} | exits | _sizes(source, experiment, path))
    scale, notes = _router_scale(experiment.router.router_temp)
    shapes = expected_shapes(config)
    theirs = {name: _authors_name(name) for name in shapes}
    wanted = {theirs[name]: shape for name, shape in shapes.items()}
    check_tensors(source, wanted, f"{path} and config.json have")
    tensors: TensorPlan = {
        name: partial(_scaled, source, old, scale if ".router.head." in name else 1.0)
        for name, old in theirs.items()
    }
    return config, tensors, notes


def _sizes(source: Source, experiment: Experiment, path: Path) -> dict[str, int]:
    """The fields of `NviumConfig` that size adapters and routers."""
    router, first = experiment.router, "router_layers.0.layers.0"
    return {
        "router_num_blocks": _router_blocks(source, router, path),
        "router_intermediate_size": _size(router.intermediate_size, source, f"{first}.fc1.weight"),
        "router_hidden_size": _size(router.hidden_size, source, f"{first}.fc2.weight"),
        "exit_adapter_size": _adapter_size(
            source, experiment.early_adapter, f"early_adapter.enabled in {path}",
            "early_adapters.0.0.weight",
        ),
        "final_adapter_size": _adapter_size(
            source, experiment.final_adapter, f"final_adapter.enabled in {path}",
            "final_adapter.0.weight",
        ),
    }  # fmt: skip


def _renamed(source: Source, theirs: dict[str, str]) -> Source:
    """The same source under other names: `theirs` maps a new name to the one in the file."""
    return dataclasses.replace(
        source,
        shapes={new: source.shapes[old] for new, old in theirs.items()},
        load=lambda name: source.load(theirs[name]),
    )


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


def _router_blocks(source: Source, router: Router, path: Path) -> int:
    pattern = re.compile(r"router_layers\.0\.layers\.(\d+)\.fc1\.weight")
    found = [match for name in source.shapes if (match := pattern.fullmatch(name))]
    count, declared = 1 + max((int(match[1]) for match in found), default=0), router.num_layers
    # The release builds one block for simple_mlp whatever num_layers says.
    allowed = {declared, 1} if router.router_type == "simple_mlp" else {declared}
    if type(declared) is int and count not in allowed:
        raise UserError(
            f"{source.name} has {count} blocks in router_layers.0, and router.num_layers in {path} "
            f"is {declared}."
        )
    return count


def _adapter_size(source: Source, adapter: Adapter, switch: str, first: str) -> int:
    """Inner width of an adapter, 0 when there is none."""
    present = first in source.shapes
    if adapter.enabled and not present:
        raise UserError(f"{source.name} has no tensor {first}, and {switch} is true.")
    if adapter.enabled is False and present:
        raise UserError(f"{source.name} has a tensor {first}, and {switch} is false.")
    return _size(adapter.dim, source, first) if present else 0


def _size(declared: Any, source: Source, name: str) -> int:
    """The declared size, or the tensor's own first dimension when the YAML leaves it open."""
    if type(declared) is int and declared > 0:
        return declared
    shape = source.shapes.get(name)
    if shape is None:
        raise UserError(f"{source.name} has no tensor {name}.")
    return int(shape[0])


def _router_scale(temperature: float) -> tuple[float, list[str]]:
    """What to multiply the routers' heads with, and what to tell the user about it."""
    if temperature == 0:
        return 1.0, [
            "router_temp is 0 (leave when p > 0.5), a choice made while decoding: the learnt "
            "hazards are kept as they are."
        ]
    if temperature == 1:
        return 1.0, []
    return 1.0 / temperature, [
        f"router_temp is {temperature}: every router head is divided by it, which gives the same "
        "hazards."
    ]


def _authors_name(name: str) -> str:
    for ours, theirs in RENAMED:
        if re.fullmatch(ours, name):
            return re.sub(ours, theirs, name)
    return name


def _scaled(source: Source, name: str, scale: float) -> torch.Tensor:
    tensor = source.load(name)
    return tensor if scale == 1.0 else tensor.float() * scale
