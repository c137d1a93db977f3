# SPDX-License-Identifier: Apache-2.0
"""A dense model plus exits: the weights are copied, every exit gets a norm, an adapter that is the
identity, and a router with a constant hazard. With hazards of zero the result is the dense model.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from vllm_nvium.checkpoints.convert.checkpoint import Source, TensorPlan, check_tensors
from vllm_nvium.checkpoints.convert.options import DenseOptions
from vllm_nvium.errors import UserError, first_line
from vllm_nvium.model_executor.models.checkpoint_layout import Shape, expected_shapes
from vllm_nvium.model_executor.models.configuration_nvium import NviumConfig
from vllm_nvium.model_executor.models.families import family_of
from vllm_nvium.model_executor.models.parent import parent_of

# sigmoid of this is exactly 0 in float32 (and of its negative exactly 1), it is finite in every
# float dtype, and float16 still holds it.
CERTAIN = 1e4
# How the names of tensors begin that a dense model has not.
OWN = ("exits.", "final_adapter.")


def evenly_spaced(num_exits: int, num_layers: int) -> list[int]:
    """Exits after `k L / N` layers, rounded down: `[6, 12, 18]` of 24 for three exits.

    Raises:
        UserError: there are too few layers for so many exits.
    """
    if not 1 <= num_exits < num_layers:
        raise UserError(
            f"--num-exits is {num_exits}, and a model of {num_layers} layers takes 1 to "
            f"{num_layers - 1}."
        )
    return [k * num_layers // (num_exits + 1) for k in range(1, num_exits + 1)]


def hazard_margin(hazard: float) -> float:
    """The margin `e - c` whose sigmoid is `hazard`; 0 and 1 give -1e4 and 1e4."""
    if hazard in (0.0, 1.0):
        return CERTAIN if hazard else -CERTAIN
    return math.log(hazard) - math.log1p(-hazard)


def parent_config(source: Source) -> PretrainedConfig:
    """The configuration of a dense model, with the fields of its family's class and no others.

    Raises:
        UserError: a family or a feature that N-vium does not have.
    """
    model_type = source.config.get("model_type")
    if model_type == NviumConfig.model_type:
        raise UserError(f"{source.name} is an N-vium checkpoint already.")
    family_of(model_type, source.name)
    if source.config.get("quantization_config"):
        method = source.config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"{source.name} is quantised ({method}), and only plain float weights can be converted."
        )
    config = source.load_config()
    # Of what else stands in a config.json, some says where it was or what it was packed for.
    names = {field.name for field in dataclasses.fields(config)}
    names -= {field.name for field in dataclasses.fields(PretrainedConfig)}
    return parent_of(type(config)(**{name: getattr(config, name) for name in names}), {})


def make_config(fields: dict[str, Any]) -> NviumConfig:
    """`NviumConfig` of these fields."""
    try:
        return NviumConfig(**fields)
    except ValueError as error:
        raise UserError(f"{first_line(error)}.") from error


def plan(source: Source, options: DenseOptions) -> tuple[NviumConfig, TensorPlan]:
    """The configuration of the N-vium model, and how to make each of its tensors."""
    parent = parent_config(source)
    exit_layers = (
        evenly_spaced(options.num_exits, parent.num_hidden_layers)
        if options.exit_layers is None
        else list(options.exit_layers)
    )
    config = make_config(
        {
            "text_config": parent,
            "exit_layers": exit_layers,
            "exit_adapter_size": options.adapter_size,
            "final_adapter_size": options.adapter_size,
            "router_intermediate_size": options.router_size,
        }
    )
    hazards = _one_per_exit(options.hazards, len(exit_layers))
    shapes = expected_shapes(config)
    check_backbone(source, shapes)
    tensors: TensorPlan = {}
    for name, shape in shapes.items():
        if name.startswith(OWN):
            tensors[name] = partial(_new_tensor, name, shape, source, config, hazards, options)
        else:
            tensors[name] = partial(source.load, name)
    return config, tensors


def check_backbone(source: Source, shapes: Mapping[str, Shape]) -> None:
    """Compare the source's tensors with those that an N-vium checkpoint of these shapes takes over
    from it.
    """
    wanted = {name: shape for name, shape in shapes.items() if not name.startswith(OWN)}
    # Tied checkpoints may repeat the embeddings.
    check_tensors(source, wanted, "its config.json has", may_have=("lm_head.weight",))


def _one_per_exit(hazards: Sequence[float], num_exits: int) -> list[float]:
    values = list(hazards) * num_exits if len(hazards) == 1 else list(hazards)
    if len(values) != num_exits:
        raise UserError(
            f"--hazards has {len(values)} values, and {num_exits} exits need 1 or {num_exits}."
        )
    return values


def _new_tensor(
    name: str,
    shape: Shape,
    source: Source,
    config: NviumConfig,
    hazards: Sequence[float],
    options: DenseOptions,
) -> torch.Tensor:
    """One tensor of an exit or of the final adapter."""
    if name.endswith("adapter.fc2.weight"):
        return torch.zeros(shape)  # makes the adapter the identity
    if name.endswith("router.head.weight"):
        return torch.zeros(shape)  # makes the hazard the same for every token
    if name.endswith("router.head.bias"):
        hazard = hazards[int(name.split(".")[1])]
        return torch.tensor([0.0, hazard_margin(hazard)])
    if name.endswith(".norm.weight"):
        if options.exit_norm == "ones" or "router" in name:
            return torch.ones(shape)
        # An exit's own norm has no offset, whatever the family.
        return source.load("model.norm.weight").float() + config.family.norm_offset
    if name.endswith(".bias"):
        return torch.zeros(shape)
    # Seeded by name, so that one tensor's values do not depend on which others exist.
    seed = int.from_bytes(f"{options.seed}:{name}".encode(), "big") % (2**63 - 1)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return config.initializer_range * noise
