# SPDX-License-Identifier: Apache-2.0
"""Copies of linear layers at low precision that GPUs multiply with, by operators of torch and of
vLLM."""

import torch

from vllm_nvium.model_executor.layers.low_precision_linear import (
    FP8,
    INT8,
    Int4Linear,
    LowPrecisionLinear,
    custom_ops,
    group_refusal,
    multiples_refusal,
)
from vllm_nvium.model_executor.ops.quantise import (
    dequantise_int8,
    in_parts,
    quantise_fp8,
    quantise_int8,
)


class Int4LinearOnCUDA(Int4Linear):
    """`Int4Linear` on GPUs, where torch lays the weights out in tiles of 16 x TILES inputs."""

    device_type = "cuda"
    TILES = 8

    @classmethod
    def refusal(cls, outputs: int, inputs: int) -> str | None:
        if outputs % 8 or inputs % (16 * cls.TILES):
            return f"{outputs} x {inputs} are no multiples of 8 x {16 * cls.TILES}"
        return group_refusal(inputs)

    @classmethod
    def packed(cls, levels: torch.Tensor) -> torch.Tensor:
        # Two in a byte, the first in the upper half. Eight rows are a tile.
        pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
        return torch.ops.aten._convert_weight_to_int4pack(pairs, cls.TILES)

    @staticmethod
    def product(
        x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, outputs: int
    ) -> torch.Tensor:
        group = x.shape[1] // scales.shape[0]
        multiply = torch.ops.aten._weight_int4pack_mm
        return multiply(x.contiguous(), levels, group, scales)


class Int8LinearByCUTLASS(LowPrecisionLinear):
    """The product of int8 weights and int8 activations, which have a scale per row, that vLLM has
    for quantised models: for GPUs of NVIDIA, those without float8 too."""

    kernel, kind, device_type = "CUTLASS W8A8", INT8, "cuda"
    bytes_per_weight = 1.0

    @classmethod
    def refusal(cls, outputs: int, inputs: int) -> str | None:
        # With other sizes vLLM takes a kernel of Triton's, which nobody has timed.
        return multiples_refusal(outputs, inputs, 16)

    def copy_weight(self, weight: torch.Tensor) -> None:
        # On ROCm vLLM takes a kernel of Triton's for all sizes.
        if getattr(torch.version, "hip", None):
            raise NotImplementedError
        levels, scales = in_parts(quantise_int8, weight)
        self._keep(levels=levels, scales=scales[:, None])

    @staticmethod
    def product(
        x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, outputs: int
    ) -> torch.Tensor:
        ops = custom_ops()
        rounded, of_rows, _ = ops.scaled_int8_quant(x.contiguous())
        # The weight as [K, N], its inputs next to each other in memory.
        output: torch.Tensor = ops.cutlass_scaled_mm(
            rounded, levels.t(), scale_a=of_rows, scale_b=scales, out_dtype=torch.bfloat16
        )
        return output

    @classmethod
    def meant(cls, weight: torch.Tensor) -> torch.Tensor:
        levels, scales = quantise_int8(weight)
        return dequantise_int8(levels, scales[:, None])


class FP8Linear(LowPrecisionLinear):
    """torch's product of float8 weights and activations, with a scale per row of each."""

    kernel, kind, device_type = "torch W8A8 float8", FP8, "cuda"
    bytes_per_weight = 1.0

    @classmethod
    def refusal(cls, outputs: int, inputs: int) -> str | None:
        return multiples_refusal(outputs, inputs, 16)

    def copy_weight(self, weight: torch.Tensor) -> None:
        levels, scales = in_parts(quantise_fp8, weight)
        self._keep(levels=levels, scales=scales.t())

    @staticmethod
    def product(
        x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, outputs: int
    ) -> torch.Tensor:
        rounded, of_rows = quantise_fp8(x)
        return torch._scaled_mm(
            rounded, levels.t(), scale_a=of_rows, scale_b=scales, out_dtype=torch.bfloat16
        )

    @classmethod
    def meant(cls, weight: torch.Tensor) -> torch.Tensor:
        levels, scales = quantise_fp8(weight)
        return levels.float() * scales
