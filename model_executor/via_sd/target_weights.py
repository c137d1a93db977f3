# SPDX-License-Identifier: Apache-2.0
"""The weights that a slim verifier at low precision has copies of, as numbers: those of the
target's linear layers and its unembedding, as vLLM has them between loading and processing.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Int8,
)
from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise

from vllm_nvium.model_executor.layers.low_precision_linear import INT4, KINDS
from vllm_nvium.model_executor.ops.quantise import dequantise_int8


def head_of(model: Any) -> Any:
    """The module of a target whose weight is the unembedding: for tied ones the embedding."""
    head = getattr(model, "lm_head", None)
    return model.model.embed_tokens if head is None else head


def linears_of(layers: Sequence[nn.Module]) -> list[Any]:
    """The linear layers of decoder layers whose weights can be read: those that are not quantised,
    and those in eight bits."""
    return [
        module
        for layer in layers
        for module in layer.modules()
        if isinstance(module, LinearBase)
        and (isinstance(module.quant_method, UnquantizedLinearMethod) or is_int8(module))
    ]


def shapes_of(model: nn.Module, layers: Sequence[nn.Module]) -> set[tuple[int, int]]:
    """(outputs, inputs) of all weights that are to be copied; of this rank's parts of them."""
    return {tuple(module.weight.shape) for module in [*linears_of(layers), head_of(model)]}


def cheaper_kinds(layers: Sequence[nn.Module]) -> tuple[str, ...]:
    """Kinds of copies that have fewer bits than the target's own layers."""
    return (INT4,) if any(map(is_int8, linears_of(layers))) else KINDS


def is_int8(module: Any) -> bool:
    """Whether vLLM multiplies with its weight in eight bits, and turns nothing around it."""
    return isinstance(module.quant_method, CompressedTensorsLinearMethod) and isinstance(
        module.scheme, CompressedTensorsW8A8Int8
    )


def is_to_come(module: Any) -> bool:
    """Whether a layer has no weight yet, because weights come in parts (`start_weight_update`)."""
    return module.weight is not None and bool(module.weight.is_meta)


def as_loaded(module: Any) -> bool:
    """Whether a layer that vLLM has processed still has its weight as it was loaded."""
    return not is_int8(module) and module.weight.numel() > 0


def weight_of(module: Any, outputs: int | None = None) -> torch.Tensor:
    """[N, K], the weight of a layer that vLLM has loaded and not processed yet; float32 where it
    has eight bits, and then what they stand for.

    Args:
        outputs: so many of them are enough, where the layer is not quantised.
    """
    if is_int8(module):
        scale = module.weight_scale.data
        if 1 < scale.numel() < len(module.weight):  # one for each of the layers that are fused
            scale = convert_to_channelwise(scale, module.output_partition_sizes)
        return dequantise_int8(module.weight.data, scale)
    weight: torch.Tensor = module.weight.data[:outputs]
    return weight


# --- Timing ---------------------------------------------------------------------------------------


def input_of(module: Any) -> torch.Tensor:
    """[1, K], a row that a layer takes."""
    weight = module.weight.data
    # While vLLM loads a model, torch's default is the model's dtype.
    dtype = torch.get_default_dtype() if is_int8(module) else weight.dtype
    return torch.ones(1, weight.shape[1], dtype=dtype, device=weight.device)


def product_of_vllm(
    module: Any, outputs: int | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product with a layer's weight as vLLM itself computes it. The layer is left as it is.

    Args:
        outputs: so many of them are enough, where the layer is not quantised.
    """
    method = module.quant_method
    if is_int8(module):
        layer = copy.copy(module)
        # Processing writes into the scheme's kernel and into the parameters.
        layer.scheme = copy.deepcopy(module.scheme)
        layer.__dict__["_parameters"] = {
            name: None if value is None else nn.Parameter(value.data.clone(), requires_grad=False)
            for name, value in vars(module)["_parameters"].items()
        }
    else:
        layer = nn.Module()
        layer.weight = nn.Parameter(weight_of(module, outputs).clone(), requires_grad=False)
    method.process_weights_after_loading(layer)
    return lambda x: method.apply(layer, x, None)
