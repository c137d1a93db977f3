# SPDX-License-Identifier: Apache-2.0
"""How weights are rounded to four and eight bits, and what the rounded ones stand for. Kernels that
multiply with them are in `layers/low_precision_linear.py` and `layers/low_precision_on_gpu.py`.
"""

from collections.abc import Callable

import torch

LARGEST_FP8 = 448.0
# Weights that are rounded at a time, whose steps need several times their memory: on a processor so
# few that all of them stay in its cache, on a GPU many, because each step is a launch.
AT_A_TIME_ON_CPU, AT_A_TIME = 2**18, 2**24


def quantise_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to the nearest of 16 levels between the least and the largest weight of each group.

        s = (max - min) / 15,   z = min + 8 s,   w ~ (q - 8) s + z

    Args:
        weight: [N, K]; group: divides K.

    Returns:
        q, [N, K] int32 in 0..15, and [K / group, N, 2] float32, s and z.
    """
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // group, group)
    low, high = (edge.float() for edge in torch.aminmax(grouped, dim=2))
    scale = ((high - low) / 15).clamp(min=1e-8)
    levels = (grouped - low[..., None]).div_(scale[..., None]).round_()
    scales = torch.stack([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous()
    return levels.to(torch.int32).view(rows, columns), scales


def dequantise_int4(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[N, K] float32, the weights that `quantise_int4` stands for."""
    rows, columns = levels.shape
    scale, zero = scales.float().unbind(dim=-1)
    grouped = (levels - 8).float().view(rows, scale.shape[0], -1)
    return (grouped * scale.t()[..., None] + zero.t()[..., None]).view(rows, columns)


def quantise_int8(weight: torch.Tensor, largest: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric, one scale per output.

        s = max |w| / l,   w ~ q s

    Args:
        weight: [N, K].
        largest: l, at most 127.

    Returns:
        q, [N, K] int8, and [N] float32, s.
    """
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / largest).clamp(min=1e-8)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def dequantise_int8(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`w = q s`, with s per output, or one for all of them.

    Args:
        levels: q, [N, K] int8.
        scale: s, [N, 1] or [1].

    Returns:
        [N, K] float32.
    """
    return levels.float() * scale.float()


def quantise_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per row, so that the largest of the row is the largest number of float8_e4m3fn.

    Args:
        weight: [N, K], or activations [T, K].

    Returns:
        q, [N, K] float8_e4m3fn, and [N, 1] float32, s, with w ~ q s.
    """
    weight = weight.float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / LARGEST_FP8).clamp(min=1e-8)
    return (weight / scale).to(torch.float8_e4m3fn), scale


def parts_of(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Some outputs each of [N, K], a multiple of the 64 that kernels lay out together."""
    most = AT_A_TIME_ON_CPU if weight.device.type == "cpu" else AT_A_TIME
    return weight.split(max(most // weight.shape[1] // 64, 1) * 64)


def in_parts(
    quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and scales of all outputs, a part of them at a time."""
    parts = [quantise(part) for part in parts_of(weight)]
    return torch.cat([levels for levels, _ in parts]), torch.cat([scale for _, scale in parts])
