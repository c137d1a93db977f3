# SPDX-License-Identifier: Apache-2.0
"""Copies of linear layers at low precision, for a slim verifier that is the target itself with
cheaper weights: what all of them have, and those that processors multiply with.
"""

import itertools
import threading
from abc import abstractmethod
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from vllm_nvium.model_executor.layers import fbgemm
from vllm_nvium.model_executor.ops.quantise import (
    dequantise_int4,
    dequantise_int8,
    in_parts,
    parts_of,
    quantise_int4,
    quantise_int8,
)

INT4, INT8, FP8 = "int4", "int8", "fp8"
KINDS = (INT4, INT8, FP8)
# Inputs of one int4 group share a scale and a zero point. Larger groups are cheaper and less true.
GROUPS = (128, 64)


def bounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in another dtype. In float16, whose largest number a rounded weight may exceed where the
    weight itself does not, every value becomes a finite one, at most half of the largest."""
    if dtype != torch.float16:
        return x.to(dtype)
    most = torch.finfo(dtype).max / 2
    return x.float().nan_to_num(0.0).clamp(-most, most).to(dtype)


class LowPrecisionLinear(nn.Module):
    """A copy of the weight of a linear layer.

    Attributes:
        kernel: what multiplies, for logs; kind: one of `KINDS`; device_type: where it runs.
        bytes_per_weight: of the copy, scales included.
        activations: the dtype that the kernel takes them in.
    """

    kernel: ClassVar[str]
    kind: ClassVar[str]
    device_type: ClassVar[str]
    bytes_per_weight: ClassVar[float]
    activations: ClassVar[torch.dtype] = torch.bfloat16
    # All classes, as compiled code knows them.
    by_name: ClassVar[dict[str, type["LowPrecisionLinear"]]] = {}
    levels: torch.Tensor
    scales: torch.Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.by_name[cls.__name__] = cls

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.outputs = weight.shape[0]
        self.copy_weight(weight)

    @classmethod
    def refusal(cls, outputs: int, inputs: int) -> str | None:
        """Why it cannot take a weight [outputs, inputs]; None where it can."""
        return None

    @abstractmethod
    def copy_weight(self, weight: torch.Tensor) -> None:
        """Makes the copy of a weight [N, K], or makes it anew: `levels` and `scales`."""

    @staticmethod
    @abstractmethod
    def product(
        x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, outputs: int
    ) -> torch.Tensor:
        """`x W^T`, [T, N], for x [T, K] in the dtype `activations` and N outputs."""

    @classmethod
    @abstractmethod
    def meant(cls, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] float32, the weights that a copy stands for, by the formulas above."""

    def prepare(self) -> None:
        """What of a copy can be made without the weight, beside other work; otherwise the first
        product makes it."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T`, in the dtype of x."""
        if torch.compiler.is_compiling():
            # One operator that the compiler does not look into: that which was compared with its
            # formula at start is what runs. With the parts in its sight, torch 2.13's compiler
            # rounded what attention had not written yet.
            return _product(x, self.levels, self.scales, type(self).__name__, self.outputs)
        output = self.product(x.to(self.activations), self.levels, self.scales, self.outputs)
        return bounded(output, x.dtype)

    def _keep(self, **tensors: torch.Tensor) -> None:
        """As buffers. Compiled code and CUDA graphs read those that they have seen, so that a new
        copy goes where the old one is."""
        for name, tensor in tensors.items():
            if name in self._buffers:
                self.get_buffer(name).copy_(tensor)
            else:
                self.register_buffer(name, tensor, persistent=False)


class Int4Linear(LowPrecisionLinear):
    """torch's int4 weights on CPU, with activations in bfloat16."""

    kernel, kind, device_type = "torch W4A16", INT4, "cpu"
    bytes_per_weight = 0.5 + 4 / GROUPS[0]

    @classmethod
    def refusal(cls, outputs: int, inputs: int) -> str | None:
        if outputs % 16:
            return f"{outputs} outputs are no multiple of 16"
        return group_refusal(inputs)

    def copy_weight(self, weight: torch.Tensor) -> None:
        packed, scales = [], []
        for part in parts_of(weight):
            levels, of_part = quantise_int4(part, group_of(weight.shape[1]))
            packed.append(self.packed(levels))
            scales.append(of_part.to(torch.bfloat16))
        self._keep(levels=torch.cat(packed), scales=torch.cat(scales, dim=1).contiguous())

    @classmethod
    def packed(cls, levels: torch.Tensor) -> torch.Tensor:
        """Levels [N, K] as the kernel reads them; parts of N are packed by themselves."""
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)

    @staticmethod
    def product(
        x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, outputs: int
    ) -> torch.Tensor:
        group = x.shape[1] // scales.shape[0]
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(x.contiguous(), levels, group, scales)

    @classmethod
    def meant(cls, weight: torch.Tensor) -> torch.Tensor:
        levels, scales = quantise_int4(weight, group_of(weight.shape[1]))
        return dequantise_int4(levels, scales.to(torch.bfloat16))


class Int8Linear(LowPrecisionLinear):
    """torch's int8 weights, with activations in bfloat16."""

    kernel, kind, device_type = "torch W8A16", INT8, "cpu"
    bytes_per_weight = 1.0

    @classmethod
    def refusal(cls, outputs: int, inputs: int) -> str | None:
        # With other sizes torch 2.13 was seen to read beyond the weight.
        return multiples_refusal(outputs, inputs, 32)

    def copy_weight(self, weight: torch.Tensor) -> None:
        levels, scales = in_parts(quantise_int8, weight)
        self._keep(levels=levels, scales=scales.to(torch.bfloat16))

    @staticmethod
    def product(
        x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, outputs: int
    ) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), levels, scales)

    @classmethod
    def meant(cls, weight: torch.Tensor) -> torch.Tensor:
        levels, scales = quantise_int8(weight)
        return dequantise_int8(levels, scales.to(torch.bfloat16)[:, None])


class Int8LinearByOneDNN(LowPrecisionLinear):
    """oneDNN's product of int8 weights and int8 activations, which have a scale per row, through
    vLLM's custom operators."""

    kernel, kind, device_type = "oneDNN W8A8", INT8, "cpu"
    bytes_per_weight = 1.0
    # Sizes of the activations that oneDNN keeps a primitive for, as in vLLM's own layers.
    PRIMITIVES = 32

    @classmethod
    def refusal(cls, outputs: int, inputs: int) -> str | None:
        return None if custom_ops()._supports_onednn else "vLLM was built without oneDNN"

    def copy_weight(self, weight: torch.Tensor) -> None:
        levels, scales = in_parts(quantise_int8, weight)
        # oneDNN packs the levels and keeps a pointer to the scales: those that stay.
        self._keep(scales=scales)
        handler = custom_ops().create_onednn_scaled_mm(
            levels.t(), self.scales, torch.bfloat16, True, False, self.PRIMITIVES
        )
        # Not the tensor of the handler, which frees what that says: a later copy writes here.
        self._keep(levels=handler.handler_tensor.clone())
        self._handler = handler

    @staticmethod
    def product(
        x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, outputs: int
    ) -> torch.Tensor:
        ops, handler = custom_ops(), SimpleNamespace(handler_tensor=levels)
        rounded, of_rows, _ = ops.onednn_scaled_int8_quant(x.contiguous(), None, None, True)
        output = x.new_empty(x.shape[0], outputs)
        ops.onednn_scaled_mm(handler, rounded, output, of_rows, None, None, None)
        return output

    @classmethod
    def meant(cls, weight: torch.Tensor) -> torch.Tensor:
        levels, scales = quantise_int8(weight)
        return dequantise_int8(levels, scales[:, None])


class Int8LinearByFBGEMM(LowPrecisionLinear):
    """FBGEMM's product of int8 weights and activations, through torch's quantised operators: the
    fastest on processors without AVX-512."""

    kernel, kind, device_type = "FBGEMM W8A8", INT8, "cpu"
    bytes_per_weight = 1.0
    activations = torch.float32
    # The largest weight of an output and the largest activation of a row. Processors without VNNI
    # add two products in 16 bits. These fit, with a zero point of LARGEST + 1: 2 * 81 * 201 < 2^15.
    LARGEST_WEIGHT, LARGEST = 81, 100

    # What torch packs is no tensor: compiled code knows it by a number.
    _all: "WeakValueDictionary[int, Int8LinearByFBGEMM]" = WeakValueDictionary()
    _numbers = itertools.count()

    def __init__(self, weight: torch.Tensor) -> None:
        self._lock = threading.Lock()
        super().__init__(weight)

    def copy_weight(self, weight: torch.Tensor) -> None:
        levels, scales = in_parts(partial(quantise_int8, largest=self.LARGEST_WEIGHT), weight)
        with self._lock:
            self._unpacked: torch.Tensor | None = fbgemm.quantised(levels, scales)
            self._packed: Any = None
        if "levels" not in self._buffers:
            number = next(self._numbers)
            self._all[number] = self
            self._keep(levels=torch.tensor(number), scales=torch.empty(0))  # packed with the weight

    def prepare(self) -> None:
        """Packs: FBGEMM does in one thread, and takes longer than all that goes before."""
        with self._lock:
            if self._unpacked is not None:
                self._packed, self._unpacked = fbgemm.packed(self._unpacked), None

    @property
    def packed(self) -> Any:
        if self._packed is None:
            self.prepare()
        return self._packed

    @classmethod
    def product(
        cls, x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, outputs: int
    ) -> torch.Tensor:
        packed = cls._all[int(levels)].packed
        per_level = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / cls.LARGEST
        # Rounds to integers and adds the zero point, which makes all of them positive.
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        output: torch.Tensor = multiply(x / per_level, 1.0, cls.LARGEST + 1, packed)
        return output.mul_(per_level)

    @classmethod
    def meant(cls, weight: torch.Tensor) -> torch.Tensor:
        levels, scales = quantise_int8(weight, cls.LARGEST_WEIGHT)
        return dequantise_int8(levels, scales[:, None])


@torch.library.custom_op("vllm_nvium::low_precision_product", mutates_args=())
def _product(
    x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, layer: str, outputs: int
) -> torch.Tensor:
    """`LowPrecisionLinear.multiply` of a class by its name."""
    cls = LowPrecisionLinear.by_name[layer]
    return bounded(cls.product(x.to(cls.activations), levels, scales, outputs), x.dtype)


@_product.register_fake
def _(
    x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, layer: str, outputs: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], outputs)


def group_of(inputs: int) -> int:
    """The largest of `GROUPS` that divides the inputs of a layer."""
    return next(group for group in GROUPS if inputs % group == 0)


def multiples_refusal(outputs: int, inputs: int, of: int) -> str | None:
    if outputs % of or inputs % of:
        return f"{outputs} x {inputs} are no multiples of {of}"
    return None


def group_refusal(inputs: int) -> str | None:
    if all(inputs % group for group in GROUPS):
        names = " or ".join(map(str, GROUPS))
        return f"{inputs} inputs do not divide into groups of {names}"
    return None


def custom_ops() -> Any:
    """vLLM's, which are loaded with the platform's library."""
    from vllm import _custom_ops

    return _custom_ops
