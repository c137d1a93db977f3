# SPDX-License-Identifier: Apache-2.0
"""What a slim verifier of each kind promises on this machine: products of the target and of copies
are timed on one weight of each shape, and the best window follows from the times.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from vllm_nvium.model_executor.layers.low_precision_linear import LowPrecisionLinear
from vllm_nvium.model_executor.via_sd.target_weights import input_of, product_of_vllm, weight_of

# The share of the tokens of a slim verifier of each kind that the target is taken to keep, before
# any was seen. It only orders the kinds; what is really kept decides how they are used.
SURVIVAL = {"int4": 0.95, "fp8": 0.97, "int8": 0.98}
# Rows of the passes that are timed: a request's newest token, and windows to be verified.
TIMED_ROWS = (1, 2, 4, 8)
# And of the target's passes, which verify the windows of a batch.
VERIFIED_ROWS = (*TIMED_ROWS, 32)
# A weight with more outputs is timed by a part of it.
TIMED_OUTPUTS = 8192
# Everything is timed so often, fewer times if that takes longer than so many seconds.
REPETITIONS, FEWEST_REPETITIONS, TIMED_SECONDS = 5, 3, 1.0
K = TypeVar("K")
# (outputs, inputs) of a weight.
Shape = tuple[int, int]
# What multiplies with a weight of each shape.
Products = Mapping[Shape, Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Timing:
    """Seconds of all linear layers and the unembedding of one pass.

    Attributes:
        layer: what multiplies; None for the target's own.
        seconds: by the rows of the pass.
    """

    layer: type[LowPrecisionLinear] | None
    seconds: Mapping[int, float]

    @property
    def kind(self) -> str:
        """Of copies."""
        assert self.layer is not None
        return self.layer.kind

    def at(self, rows: float) -> float:
        """Seconds for so many rows, between those timed and beyond them by straight lines."""
        sizes = sorted(self.seconds)
        for low, high in zip(sizes, sizes[1:], strict=False):
            if rows <= high or high == sizes[-1]:
                slope = (self.seconds[high] - self.seconds[low]) / (high - low)
                return self.seconds[low] + slope * (rows - low)
        return self.seconds[sizes[0]]


def promise(
    full: Timing, slim: Timing, survival: float, lengths: Iterable[int], batch: int = 1
) -> float:
    """Tokens per time of plain decoding when the slim verifier drafts for itself for all of b
    requests, with the best length n of their windows. A window of length 0 is plain decoding.

        max_n  (1 + s + ... + s^n) full(b) / (n slim(b) + full(b (n + 1)))

    Args:
        survival: s, the chance that the target keeps a slim token.
        lengths: tokens that a window may have.
        batch: b.
    """
    best = 0.0
    for n in lengths:
        tokens = sum(survival**k for k in range(n + 1))
        seconds = n * slim.at(batch) + full.at(batch * (n + 1))
        best = max(best, tokens * full.at(batch) / seconds)
    return best


@dataclass(frozen=True)
class Windows:
    """Those that an engine may have.

    Attributes:
        shortest: least tokens of one, 0 where requests may go without; longest: most tokens.
        most_requests: of a step; most_rows: of a pass.
    """

    shortest: int
    longest: int
    most_requests: int
    most_rows: int

    def of(self, batch: int) -> range:
        """Tokens of each window when so many requests are verified in one pass."""
        longest = min(self.longest, max(self.most_rows // batch - 1, 0))
        return range(min(self.shortest, longest), longest + 1)


def time_candidates(
    linears: Sequence[Any], head: Any, candidates: Sequence[type[LowPrecisionLinear]]
) -> tuple[Timing, list[Timing]]:
    """The target's own products and those of every candidate, each timed on one weight of each
    shape, all in turn, so that hardly any finds its weights in the cache."""
    modules = [*linears, head]
    count: dict[Shape, int] = {}
    example: dict[Shape, Any] = {}
    for module in modules:
        shape = tuple(module.weight.shape)
        count[shape] = count.get(shape, 0) + 1
        example.setdefault(shape, module)
    full = {shape: product_of_vllm(module, TIMED_OUTPUTS) for shape, module in example.items()}
    weights = {shape: weight_of(module, TIMED_OUTPUTS) for shape, module in example.items()}
    # What a part of a weight was timed for is scaled to all of them.
    scale = {shape: n * shape[0] / weights[shape].shape[0] for shape, n in count.items()}
    inputs = {shape: input_of(module) for shape, module in example.items()}
    products: dict[type[LowPrecisionLinear] | None, Products] = {None: full}
    for layer in candidates:
        products[layer] = {shape: layer(weight).multiply for shape, weight in weights.items()}
    sizes = {kind: VERIFIED_ROWS if kind is None else TIMED_ROWS for kind in products}
    found = time_by_rows(products, sizes, inputs, scale)
    return Timing(None, found[None]), [Timing(layer, found[layer]) for layer in candidates]


def time_by_rows(
    products: Mapping[K, Products],
    sizes: Mapping[K, Sequence[int]],
    ones: Mapping[Shape, torch.Tensor],
    scale: Mapping[Shape, float],
) -> dict[K, dict[int, float]]:
    """Seconds of a pass by its rows, of every kind. All kinds and all sizes take turns: while a
    machine is slow, or the processor's clock still rises, it is so for each of them.

    Args:
        products: by kind and by the shape of a weight, what multiplies with one of that shape.
        sizes: rows of the passes of each kind.
        ones: an input of one row for each shape.
        scale: how many times each shape counts in a pass.
    """
    all_rows = sorted({rows for of_kind in sizes.values() for rows in of_kind})
    inputs = {(rows, shape): ones[shape].repeat(rows, 1) for rows in all_rows for shape in ones}
    cases = [
        (kind, rows, shape)
        for rows in all_rows
        for kind in products
        if rows in sizes[kind]
        for shape in ones
    ]
    seconds: dict[tuple[K, int, Shape], list[float]] = {case: [] for case in cases}
    begun = time.perf_counter()
    for repetition in range(REPETITIONS + 1):
        if repetition > FEWEST_REPETITIONS and time.perf_counter() - begun > TIMED_SECONDS:
            break
        for kind, rows, shape in cases:
            x, product = inputs[rows, shape], products[kind][shape]
            _synchronise(x)
            start = time.perf_counter()
            product(x)
            _synchronise(x)
            if repetition:  # the first makes what is made once
                seconds[kind, rows, shape].append(time.perf_counter() - start)
    return {
        kind: not_falling(
            {
                rows: sum(median(seconds[kind, rows, shape]) * scale[shape] for shape in ones)
                for rows in sizes[kind]
            }
        )
        for kind in products
    }


def not_falling(seconds: Mapping[int, float]) -> dict[int, float]:
    """Times by rows in which no pass is taken to last longer than one of more rows.

    What was measured longer is taken to have been disturbed, as it was on processors. A kernel that
    really is slower with fewer rows is promised too much, and with such a target too little.
    """
    sizes = sorted(seconds)
    return {rows: min(seconds[more] for more in sizes[at:]) for at, rows in enumerate(sizes)}


def _synchronise(x: torch.Tensor) -> None:
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
