# SPDX-License-Identifier: Apache-2.0
"""How weights are rounded: the formulas of copies at low precision."""

import pytest
import torch

from vllm_nvium.model_executor.layers.low_precision_linear import Int4Linear
from vllm_nvium.model_executor.ops.quantise import (
    dequantise_int4,
    quantise_fp8,
    quantise_int4,
    quantise_int8,
)


def weight_of(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator)


@pytest.mark.parametrize("group", [64, 128])
def test_int4_is_at_most_half_a_step_away(group: int) -> None:
    weight = weight_of(48, 256) + 0.3
    levels, scales = quantise_int4(weight, group)
    assert levels.min() == 0 and levels.max() == 15, "each group reaches both ends"
    assert levels.dtype == torch.int32 and scales.shape == (256 // group, 48, 2)
    step = scales[..., 0].t().repeat_interleave(group, dim=1)
    away = (dequantise_int4(levels, scales) - weight).abs()
    assert (away <= 0.5001 * step + 1e-6).all()
    spread = weight.view(48, -1, group).amax(2) - weight.view(48, -1, group).amin(2)
    torch.testing.assert_close(scales[..., 0].t(), spread / 15)


def test_int8_and_fp8_keep_the_largest_of_each_output() -> None:
    weight = weight_of(32, 96)
    levels, scale = quantise_int8(weight)
    assert (levels.abs().amax(dim=1) == 127).all()
    assert ((levels.float() * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    levels, scale = quantise_fp8(weight)
    assert (levels.float().abs().amax(dim=1) == 448).all()
    assert ((levels.float() * scale - weight).abs() <= weight.abs() / 15 + scale / 100).all()


@pytest.mark.parametrize("quantise", [quantise_int8, lambda w: quantise_int4(w, 64), quantise_fp8])
def test_a_weight_of_zeros_stays_zero(quantise: object) -> None:
    levels, scale = quantise(torch.zeros(16, 64))  # type: ignore[operator]
    assert torch.isfinite(scale).all()
    assert Int4Linear.meant(torch.zeros(16, 64)).abs().max() < 1e-6
