# SPDX-License-Identifier: Apache-2.0
"""Which low-precision copies of linear layers a machine can multiply with. That is found out by
running them: that an operator exists does not say that it works.
"""

import torch

from vllm_nvium.model_executor.layers.low_precision_linear import (
    KINDS,
    Int4Linear,
    Int8Linear,
    Int8LinearByFBGEMM,
    Int8LinearByOneDNN,
    LowPrecisionLinear,
)
from vllm_nvium.model_executor.layers.low_precision_on_gpu import (
    FP8Linear,
    Int4LinearOnCUDA,
    Int8LinearByCUTLASS,
)

LAYERS: tuple[type[LowPrecisionLinear], ...] = (
    Int4Linear,
    Int4LinearOnCUDA,
    Int8Linear,
    Int8LinearByOneDNN,
    Int8LinearByFBGEMM,
    Int8LinearByCUTLASS,
    FP8Linear,
)


def layers_for(device_type: str, kinds: tuple[str, ...] = KINDS) -> list[type[LowPrecisionLinear]]:
    """Those that this machine can run: each is tried on a small weight and compared with what it
    stands for."""
    found = []
    for layer in LAYERS:
        if layer.device_type == device_type and layer.kind in kinds and _is_right(layer):
            found.append(layer)
    return found


def _is_right(layer: type[LowPrecisionLinear]) -> bool:
    # Behind one operator are several kernels, by the sizes of both factors.
    outputs = (256,) if layer.device_type == "cpu" else (256, 8192)
    try:
        return all(_is_right_with(layer, size) for size in outputs)
    except (RuntimeError, NotImplementedError, AttributeError):  # not built for this machine
        return False


def _is_right_with(layer: type[LowPrecisionLinear], outputs: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, 256, generator=generator).to(layer.device_type, torch.bfloat16)
    x = torch.randn(129, 256, generator=generator).to(layer.device_type)
    copy, meant = layer(weight), x.to(torch.bfloat16).float() @ layer.meant(weight).t()
    # Activations are rounded too: to 8 bits of mantissa, or to 255 levels.
    near = 0.05 * meant.abs().max()
    found = ((copy.multiply(x[:rows]), rows) for rows in (3, 33, 65, 129))
    return all(bool((output - meant[:rows]).abs().max() < near) for output, rows in found)
