# SPDX-License-Identifier: Apache-2.0
"""A slim verifier at low precision: copies of the target's linear layers and of its unembedding,
made while vLLM loads the weights, of the kind that promises most on this machine. Norms, biases,
embeddings and attention modules are the target's own, and so is the KV cache.
"""

import copy
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, TypeVar

import torch
from torch import nn

from vllm_nvium.model_executor.layers.low_precision_linear import LowPrecisionLinear
from vllm_nvium.model_executor.via_sd.target_weights import (
    as_loaded,
    head_of,
    input_of,
    is_to_come,
    linears_of,
    product_of_vllm,
    weight_of,
)

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
# Copies that threads have to prepare at a time.
MOST_PREPARED = 32

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

    def at(self, rows: float) -> float:
        """Seconds for so many rows, between those timed and beyond them by straight lines."""
        sizes = sorted(self.seconds)
        for low, high in zip(sizes, sizes[1:], strict=False):
            if rows <= high or high == sizes[-1]:
                slope = (self.seconds[high] - self.seconds[low]) / (high - low)
                return self.seconds[low] + slope * (rows - low)
        return self.seconds[sizes[0]]


def promise(
    full: Timing, slim: Timing, survival: float, longest: int, batch: int = 1, shortest: int = 0
) -> float:
    """Tokens per time of plain decoding when the slim verifier drafts for itself for all of b
    requests, with the best length n of their windows. A window of length 0 is plain decoding.

        max_n  (1 + s + ... + s^n) full(b) / (n slim(b) + full(b (n + 1)))

    Args:
        survival: s, the chance that the target keeps a slim token.
        shortest, longest: least and most tokens of a window.
        batch: b.
    """
    best = 0.0
    for n in range(shortest, longest + 1):
        tokens = sum(survival**k for k in range(n + 1))
        seconds = n * slim.at(batch) + full.at(batch * (n + 1))
        best = max(best, tokens * full.at(batch) / seconds)
    return best


class Copies:
    """The copies of one model's weights.

    They are made where vLLM processes a layer's weights, which it packs and frees there: at first
    when it loads the model, and again when it loads other weights into it.

    Args:
        model: the target, its weights loaded and not processed yet.
        layers: those of its decoder layers that the slim verifier runs.
        candidates: kinds of copies; the one that promises most is taken, in the mean over batches
            of `TIMED_ROWS` requests: the cheapest for one request may be dear for eight.
        longest: most tokens of a window.
        most_requests: that a step may have.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        candidates: Sequence[type[LowPrecisionLinear]],
        longest: int,
        most_requests: int,
    ) -> None:
        self.of: dict[nn.Module, nn.Module] = {}
        # Those that were copied since anybody last asked for new copies.
        self._new: set[nn.Module] = set()
        # Of copies, in threads, while the target loads.
        self._preparing: deque[Future[None]] = deque()
        self.linears, self.head = linears_of(layers), head_of(model)
        self.full, self.timings = time_candidates(self.linears, self.head, candidates)
        self.batches = [size for size in TIMED_ROWS if size <= max(most_requests, 1)]
        self.promises_by_batch = [self._promised(timing, longest, 0) for timing in self.timings]
        self.promises = [fmean(gains) for gains in self.promises_by_batch]
        # Where windows pay for no kind, all promise what plain decoding does.
        self._with_windows = [fmean(self._promised(timing, longest, 1)) for timing in self.timings]
        self.layer = self._best()

    def _promised(self, timing: Timing, longest: int, shortest: int) -> list[float]:
        """By batch."""
        survival = SURVIVAL[_kind(timing)]
        return [promise(self.full, timing, survival, longest, b, shortest) for b in self.batches]

    def take(self, kind: str) -> None:
        """Of the candidates of this kind the one that promises most, whatever that is."""
        self.layer = self._most_promising(lambda timing: _kind(timing) == kind)

    @property
    def kind(self) -> str | None:
        return None if self.layer is None else self.layer.kind

    @property
    def num_bytes(self) -> int:
        """What the copies take, or will."""
        if self.layer is None:
            return 0
        weights = sum(module.weight.numel() for module in self._modules)
        return int(weights * self.layer.bytes_per_weight)

    @property
    def num_bytes_copied(self) -> int:
        """Of the weights that have copies."""
        return sum(module.weight.nbytes for module in self._modules)

    @property
    def _modules(self) -> list[nn.Module]:
        return [*self.linears, self.head]

    def _best(self) -> type[LowPrecisionLinear] | None:
        """None where no kind is cheaper than the target itself at any number of rows."""
        return self._most_promising(
            lambda timing: any(timing.seconds[r] < self.full.seconds[r] for r in TIMED_ROWS)
        )

    def _most_promising(
        self, is_meant: Callable[[Timing], bool]
    ) -> type[LowPrecisionLinear] | None:
        gains = zip(self.promises, self._with_windows, self.timings, strict=True)
        meant = [(gain, least, timing.layer) for gain, least, timing in gains if is_meant(timing)]
        return max(meant, key=lambda found: found[:2])[2] if meant else None

    def install(self) -> None:
        """From here on a layer's copy is made when vLLM processes its weights."""
        self._threads = threads_on_all_cores()
        for module in self._modules:
            _processed_first(module, self._copy)

    def forget_what_was_new(self) -> None:
        """The target is loaded. Weights that are written from here on are newer than the copies."""
        self._new.clear()
        # What they still have to prepare they do while the engine goes on with its start.
        self._threads.shutdown(wait=False)
        self._preparing.clear()

    def make_anew(self) -> None:
        """After weights were written. Those that vLLM has packed and freed were copied when it
        packed them. While parts of an update are still to come, nothing is copied twice: vLLM says
        when it is finished."""
        if any(map(is_to_come, self._modules)):
            return
        for module in self._modules:
            if module in self.of and module not in self._new and as_loaded(module):
                self._copy(module)
        self._new.clear()

    def _copy(self, module: Any) -> None:
        found, weight = self.of.get(module), weight_of(module)
        if found is None:
            assert self.layer is not None
            made = self.layer(weight)
            self.of[module] = with_copy(module, made)
            self._preparing.append(self._threads.submit(made.prepare))
            if len(self._preparing) > MOST_PREPARED:  # what waits takes memory
                self._preparing.popleft().result()
        else:
            found.low_precision.copy_weight(weight)  # type: ignore[union-attr,operator]
        self._new.add(module)

    def table(self) -> str:
        """For the log: milliseconds by rows, and what each kind promises by batch."""
        lines = []
        gains = [None, *self.promises_by_batch]
        for timing, promised in zip([self.full, *self.timings], gains, strict=True):
            name = (
                "target" if timing.layer is None else f"{timing.layer.kind}, {timing.layer.kernel}"
            )
            cells = [
                f"{1e3 * timing.seconds[rows]:8.2f}" if rows in timing.seconds else " " * 8
                for rows in VERIFIED_ROWS
            ]
            ends = [f"{gain:.2f}" for gain in promised or ()]
            lines.append(f"  {name:<28}{'  '.join(cells)}   {'  '.join(ends)}".rstrip())
        rows = "  ".join(f"{rows:>8}" for rows in VERIFIED_ROWS)
        batches = ", ".join(map(str, self.batches))
        return "\n".join([f"  {'rows':<28}{rows}   promise at batch {batches}", *lines])


class _ByCopy:
    """In the place of the method of one of vLLM's layers: multiplies with the copy."""

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        output: torch.Tensor = layer.low_precision.multiply(x)  # type: ignore[operator,union-attr]
        return output if bias is None else output + bias.to(output.dtype)


def with_copy(module: nn.Module, low_precision: LowPrecisionLinear) -> nn.Module:
    """A linear layer or an unembedding of vLLM that multiplies with a copy of its weight.

    All else is the module's own, so that its part of the weight stays a part: where there are
    several tensor-parallel ranks, vLLM's own code adds up or gathers what they have computed.
    """
    found = copy.copy(module)
    found.__dict__["_modules"] = dict(vars(module)["_modules"])
    found.low_precision = low_precision
    found.quant_method = _ByCopy()  # type: ignore[assignment]
    return found


def _processed_first(module: Any, do: Callable[[nn.Module], None]) -> None:
    """Before vLLM processes the weights of this module, `do(module)` runs."""
    method = module.quant_method
    base: Any = type(method)

    def process_weights_after_loading(self: Any, layer: nn.Module) -> None:
        if layer is module:
            do(layer)
        base.process_weights_after_loading(self, layer)

    members = {"process_weights_after_loading": process_weights_after_loading}
    method.__class__ = type(base.__name__, (base,), members)


def threads_on_all_cores() -> ThreadPoolExecutor:
    """On those of the process that has started this one too: vLLM binds a worker to some of them,
    and the thread that loads to one, which what that thread starts would share."""
    if not hasattr(os, "sched_getaffinity"):  # no Linux
        return ThreadPoolExecutor(1)
    parent = multiprocessing.parent_process()
    processes = ["self"] if parent is None else ["self", str(parent.pid)]
    cores: set[int] = set()
    for process in processes:
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(ProcessLookupError):  # it has ended since
                cores |= os.sched_getaffinity(int(thread))
    return ThreadPoolExecutor(len(cores), "copies", os.sched_setaffinity, (0, cores))


# --- Timing ---------------------------------------------------------------------------------------


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


def _kind(timing: Timing) -> str:
    assert timing.layer is not None
    return timing.layer.kind
