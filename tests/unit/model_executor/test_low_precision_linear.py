# SPDX-License-Identifier: Apache-2.0
"""Linear layers at low precision: the kernels against what their copies stand for."""

import gc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nvium.model_executor.layers import (
    low_precision_kernels,
    low_precision_linear,
    low_precision_on_gpu,
)
from vllm_nvium.model_executor.layers.low_precision_kernels import layers_for
from vllm_nvium.model_executor.layers.low_precision_linear import (
    Int4Linear,
    Int8Linear,
    Int8LinearByFBGEMM,
    Int8LinearByOneDNN,
    LowPrecisionLinear,
    group_of,
)
from vllm_nvium.model_executor.layers.low_precision_on_gpu import (
    FP8Linear,
    Int4LinearOnCUDA,
    Int8LinearByCUTLASS,
)
from vllm_nvium.model_executor.ops.quantise import AT_A_TIME, parts_of, quantise_int4

HERE = layers_for("cpu")
OF_256 = AT_A_TIME // 256  # outputs of 256 inputs that are rounded at a time on a GPU


def weight_of(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator)


def test_some_kernel_of_each_kind_runs_on_cpu() -> None:
    """One that computes something else is not among them: no test below would see it."""
    assert {layer.kind for layer in HERE} == {"int4", "int8"}
    assert Int4Linear in HERE and Int8Linear in HERE
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    assert (Int8LinearByFBGEMM in HERE) == has_fbgemm
    # Without VNNI it adds up in 16 bits, which overflow, and its check leaves it out.
    has_vnni = torch.cpu._is_vnni_supported() and not Int8LinearByOneDNN.refusal(32, 32)
    assert Int8LinearByOneDNN in HERE or not has_vnni


def test_every_kernel_of_the_device_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[type[LowPrecisionLinear]] = []
    monkeypatch.setattr(low_precision_kernels, "_is_right", tried.append)
    assert layers_for("cpu") == []
    assert tried == [Int4Linear, Int8Linear, Int8LinearByOneDNN, Int8LinearByFBGEMM]
    tried.clear()
    assert layers_for("cuda") == []
    assert tried == [Int4LinearOnCUDA, Int8LinearByCUTLASS, FP8Linear]


@pytest.mark.skipif(Int8LinearByFBGEMM not in HERE, reason="torch has no FBGEMM")
def test_fbgemm_packs_in_threads_and_leaves_torchs_engine_as_it_was() -> None:
    """Whoever multiplies first waits for the weight that is being packed, or packs it."""
    engine, x = torch.backends.quantized.engine, weight_of(2, 256, seed=1)
    weights = [weight_of(512, 256, seed=seed) for seed in range(24)]
    copies = [Int8LinearByFBGEMM(weight) for weight in weights]
    with ThreadPoolExecutor(4) as threads:
        for copy in copies:
            threads.submit(copy.prepare)
        found = [copy.multiply(x) for copy in copies]
    assert torch.backends.quantized.engine == engine
    for output, weight in zip(found, weights, strict=True):
        meant = x @ Int8LinearByFBGEMM.meant(weight).t()
        torch.testing.assert_close(output, meant, rtol=0.03, atol=0.03 * float(meant.abs().max()))


@pytest.mark.parametrize("layer", HERE, ids=lambda layer: layer.kernel)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("outputs,inputs", [(96, 128), (1344 + 160, 192), (32, 192)])
def test_kernels_compute_what_their_copies_stand_for(
    layer: type[LowPrecisionLinear], dtype: torch.dtype, rows: int, outputs: int, inputs: int
) -> None:
    """1504 outputs are copied in two parts."""
    assert len(parts_of(weight_of(outputs, inputs))) == (2 if outputs > 96 else 1)
    weight = weight_of(outputs, inputs).to(dtype)
    x = weight_of(rows, inputs, seed=1).to(dtype)
    found = layer(weight).multiply(x)
    assert found.dtype == dtype and found.shape == (rows, outputs)
    meant = x.to(torch.bfloat16).float() @ layer.meant(weight).t()
    torch.testing.assert_close(found.float(), meant, rtol=0.03, atol=0.03 * meant.abs().max())


@pytest.mark.parametrize("layer", HERE, ids=lambda layer: layer.kernel)
def test_a_copy_made_anew_stands_where_the_old_one_was(layer: type[LowPrecisionLinear]) -> None:
    """Compiled code and CUDA graphs hold on to the tensors that they have seen."""
    old, new = weight_of(96, 128), weight_of(96, 128, seed=5)
    copy = layer(old)
    places = {name: tensor.data_ptr() for name, tensor in copy.named_buffers()}
    copy.copy_weight(new)
    assert {name: tensor.data_ptr() for name, tensor in copy.named_buffers()} == places
    x = weight_of(2, 128, seed=1)
    torch.testing.assert_close(copy.multiply(x), layer(new).multiply(x))
    assert not torch.allclose(copy.multiply(x), layer(old).multiply(x), rtol=0.1)


@pytest.mark.parametrize("layer", HERE, ids=lambda layer: layer.kernel)
def test_copies_made_anew_are_fresh_copies(layer: type[LowPrecisionLinear]) -> None:
    """However often, and whatever has come to lie where something of the old copy was."""
    copy, x = layer(weight_of(96, 128)), weight_of(2, 128, seed=1)
    for seed in range(5, 9):
        new = weight_of(96, 128, seed=seed) * seed
        copy.copy_weight(new)
        taken = [torch.full((96,), 1e6) for _ in range(500)]
        torch.testing.assert_close(copy.multiply(x), layer(new).multiply(x), rtol=0, atol=0)
        del taken


def test_what_onednn_has_packed_is_freed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the scales that it keeps a pointer to stay."""
    made: list[int] = []
    freed: list[int] = []
    pointers: list[int] = []

    class Handler:
        """Of vLLM, which frees what its tensor says."""

        def __init__(self) -> None:
            made.append(100 + len(made))
            self.handler_tensor = torch.tensor(made[-1])

        def __del__(self) -> None:
            freed.append(int(self.handler_tensor))

    def create(weight: torch.Tensor, scales: torch.Tensor, *_: Any) -> Handler:
        pointers.append(scales.data_ptr())
        return Handler()

    ops = SimpleNamespace(create_onednn_scaled_mm=create)
    monkeypatch.setattr(low_precision_linear, "custom_ops", lambda: ops)
    copy = Int8LinearByOneDNN(weight_of(96, 128))
    for seed in (5, 6):
        copy.copy_weight(weight_of(96, 128, seed=seed))
        assert freed == made[:-1], "the copies before this one"
    assert int(copy.levels) == made[-1]
    assert pointers == [copy.scales.data_ptr()] * 3
    del copy
    gc.collect()
    assert freed == made == [100, 101, 102]


@pytest.mark.parametrize("layer", HERE, ids=lambda layer: layer.kernel)
def test_the_memory_of_a_copy_is_what_is_said(layer: type[LowPrecisionLinear]) -> None:
    copy = layer(weight_of(1024, 1024))
    held = sum(tensor.nbytes for tensor in copy.buffers())
    if held > 1024 * 1024 / 4:  # oneDNN and FBGEMM keep their own
        assert held == pytest.approx(1024 * 1024 * layer.bytes_per_weight, rel=0.01)


@pytest.mark.skipif(Int8LinearByFBGEMM not in HERE, reason="a processor without FBGEMM")
def test_copies_that_are_gone_are_not_kept() -> None:
    """Compiled code knows FBGEMM's by a number only."""
    copy = Int8LinearByFBGEMM(weight_of(32, 64))
    number = int(copy.levels)
    assert Int8LinearByFBGEMM._all[number] is copy
    del copy
    gc.collect()
    assert number not in Int8LinearByFBGEMM._all


@pytest.mark.parametrize("layer", HERE, ids=lambda layer: layer.kernel)
def test_a_row_of_zeros_and_one_of_large_numbers(layer: type[LowPrecisionLinear]) -> None:
    """Rows have scales of their own: neither changes what becomes of the other."""
    weight, x = weight_of(32, 64), weight_of(3, 64, seed=1)
    x[0] = 0
    x[2] *= 1e4
    found = layer(weight).multiply(x)
    assert found[0].abs().max() == 0
    torch.testing.assert_close(found[1:2], layer(weight).multiply(x[1:2]))


@pytest.mark.parametrize("layer", HERE, ids=lambda layer: layer.kernel)
def test_rows_have_scales_of_their_own(layer: type[LowPrecisionLinear]) -> None:
    """The rows of large and of small numbers themselves are what they are alone."""
    weight, x = weight_of(32, 64), weight_of(3, 64, seed=1)
    x *= torch.tensor([1.0, 1e4, 1e-4])[:, None]
    found = layer(weight).multiply(x)
    for row in range(3):
        alone = layer(weight).multiply(x[row : row + 1])
        near = 0.02 * float(alone.abs().max())  # kernels may add up in another order
        torch.testing.assert_close(found[row : row + 1], alone, rtol=0, atol=near)


def test_large_weights_are_quantised_in_parts_on_gpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps between take many times the memory of a copy."""
    rows: list[int] = []

    def quantise_and_count(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(len(weight))
        return quantise_int4(weight, group)

    monkeypatch.setattr(low_precision_linear, "quantise_int4", quantise_and_count)
    # Nothing is computed: the shapes are those of torch's operators.
    copy = Int4LinearOnCUDA(torch.empty(2 * OF_256 + 96, 256, device="meta"))
    assert rows == [OF_256, OF_256, 96]
    assert copy.levels.shape == ((2 * OF_256 + 96) // 8, 2, 32, 4)
    assert copy.scales.shape == (2, 2 * OF_256 + 96, 2)


def cutlass_scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """What vLLM says of its operator, and what its kernel asks for: a by rows and b by columns, and
    a scale per row of a and per column of b."""
    assert a.dtype == b.dtype == torch.int8
    assert a.is_contiguous() and b.stride() == (1, b.shape[0])
    assert scale_a.numel() == a.shape[0] and scale_b.numel() == b.shape[1]
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    sums = a.to(torch.int32) @ b.to(torch.int32)
    return (sums * scale_a.view(-1, 1) * scale_b.view(1, -1)).to(out_dtype)


def scaled_int8_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    scale = x.float().abs().amax(dim=1, keepdim=True) / 127
    return (x.float() / scale).round().to(torch.int8), scale, None


def test_vllms_int8_product_on_gpus_is_asked_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """By operators that stand in for it here: what the kernel itself computes is tried at start."""
    ops = SimpleNamespace(cutlass_scaled_mm=cutlass_scaled_mm, scaled_int8_quant=scaled_int8_quant)
    monkeypatch.setattr(low_precision_on_gpu, "custom_ops", lambda: ops)
    monkeypatch.setattr(low_precision_kernels, "LAYERS", (Int8LinearByCUTLASS,))
    monkeypatch.setattr(Int8LinearByCUTLASS, "device_type", "cpu")
    assert layers_for("cpu") == [Int8LinearByCUTLASS]
    weight, x = weight_of(1504, 192), weight_of(3, 192, seed=1)
    copy = Int8LinearByCUTLASS(weight)
    meant = x @ Int8LinearByCUTLASS.meant(weight).t()
    found = copy.multiply(x)
    torch.testing.assert_close(found, meant, rtol=0.02, atol=0.02 * float(meant.abs().max()))
    places = [tensor.data_ptr() for tensor in copy.buffers()]
    copy.copy_weight(2 * weight)
    assert [tensor.data_ptr() for tensor in copy.buffers()] == places
    torch.testing.assert_close(copy.multiply(x), 2 * found, rtol=0.02, atol=0.02)
    assert Int8LinearByCUTLASS.refusal(40, 64) == "40 x 64 are no multiples of 16"


def test_weights_that_do_not_fit_are_refused() -> None:
    assert Int4Linear.refusal(48, 128) is None
    assert Int4Linear.refusal(40, 128) == "40 outputs are no multiple of 16"
    assert Int4Linear.refusal(48, 96) == "96 inputs do not divide into groups of 128 or 64"
    assert Int8Linear.refusal(33, 64) == "33 x 64 are no multiples of 32"
    assert (group_of(1536), group_of(576)) == (128, 64)


def test_kernels_that_are_wrong_or_missing_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that exists may still be wrong on a processor that it was not tried on."""

    class Wrong(Int8Linear):
        @staticmethod
        def product(x: torch.Tensor, *packed: Any) -> torch.Tensor:
            return Int8Linear.product(x, *packed) * 1.2

    class Missing(Int8Linear):
        @staticmethod
        def product(x: torch.Tensor, *packed: Any) -> torch.Tensor:
            result: torch.Tensor = torch.ops.aten.no_such_operator(x)
            return result

    monkeypatch.setattr(low_precision_kernels, "LAYERS", (Wrong, Missing, Int8Linear))
    assert layers_for("cpu") == [Int8Linear]
    assert layers_for("cpu", ("int4",)) == []
    assert layers_for("cuda") == []
