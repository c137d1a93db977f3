# SPDX-License-Identifier: Apache-2.0
"""A slim verifier at low precision: copies of the target's linear layers and of its unembedding,
made while vLLM loads the weights, of the kind that promises most on this machine. Norms, biases,
embeddings and attention modules are the target's own, and so is the KV cache.
"""

import copy
import functools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from vllm_nvium.model_executor.layers.low_precision_linear import LowPrecisionLinear
from vllm_nvium.model_executor.via_sd.slim_timing import (
    SURVIVAL,
    TIMED_ROWS,
    VERIFIED_ROWS,
    Timing,
    Windows,
    promise,
    time_candidates,
)
from vllm_nvium.model_executor.via_sd.target_weights import (
    as_loaded,
    head_of,
    is_to_come,
    linears_of,
    weight_of,
)

# Copies that threads have to prepare at a time: what waits takes as much memory again.
MOST_PREPARED = 8


class Copies:
    """The copies of one model's weights.

    They are made where vLLM processes a layer's weights, which it packs and frees there: at first
    when it loads the model, and again when it loads other weights into it.

    Args:
        model: the target, its weights loaded and not processed yet.
        layers: those of its decoder layers that the slim verifier runs.
        candidates: kinds of copies; the one that promises most is taken, in the mean over batches
            of `TIMED_ROWS` requests: the cheapest for one request may be dear for eight.
        windows: what the engine may have.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        candidates: Sequence[type[LowPrecisionLinear]],
        windows: Windows,
    ) -> None:
        self.of: dict[nn.Module, nn.Module] = {}
        # Those that were copied since anybody last asked for new copies.
        self._new: set[nn.Module] = set()
        # Weights were written by calls that do not say when they are done.
        self._are_old = False
        # Of copies, in threads, while the target loads.
        self._preparing: deque[Future[None]] = deque()
        self.linears, self.head = linears_of(layers), head_of(model)
        self.full, self.timings = time_candidates(self.linears, self.head, candidates)
        self.batches = [size for size in TIMED_ROWS if size <= max(windows.most_requests, 1)]
        self.promises_by_batch = [self._promised(each, windows) for each in self.timings]
        self.promises = [fmean(gains) for gains in self.promises_by_batch]
        # Where windows pay for no kind, all promise what plain decoding does.
        always = replace(windows, shortest=max(windows.shortest, 1))
        self._with_windows = [fmean(self._promised(each, always)) for each in self.timings]
        self.layer = self._best()

    def _promised(self, timing: Timing, windows: Windows) -> list[float]:
        """By batch."""
        survival = SURVIVAL[timing.kind]
        return [promise(self.full, timing, survival, windows.of(b), b) for b in self.batches]

    def take(self, kind: str) -> None:
        """Of the candidates of this kind the one that promises most, whatever that is."""
        self.layer = self._most_promising(lambda timing: timing.kind == kind)

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
        with threads_on_all_cores() as threads:  # or the next step would do it, one by one
            list(threads.map(_prepare, self.of.values()))
        self._are_old = False

    def notice_loading(self, model: nn.Module) -> None:
        """Of a loaded model, whose `load_weights` is called by whoever has other weights for it:
        all at once, or one after the other. The copies are made anew before the next pass."""
        load_weights = model.load_weights

        @functools.wraps(load_weights)
        def load_and_notice(*args: Any, **kwargs: Any) -> Any:
            self._are_old = True
            return load_weights(*args, **kwargs)

        model.load_weights = load_and_notice

    def make_anew_if_old(self) -> None:
        if self._are_old:
            self.make_anew()

    def _copy(self, module: Any) -> None:
        found, weight = self.of.get(module), weight_of(module)
        if found is None:
            assert self.layer is not None
            made = self.layer(weight)
            self.of[module] = with_copy(module, made)
            self._preparing.append(self._threads.submit(made.prepare))
            if len(self._preparing) > MOST_PREPARED:
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


def _prepare(found: Any) -> None:
    found.low_precision.prepare()


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
    cores = os.sched_getaffinity(0) | _cores_of("self")
    if parent is not None:
        cores |= _cores_of(str(parent.pid))

    def spread() -> None:
        with suppress(OSError):  # a container that allows other cores by now
            os.sched_setaffinity(0, cores)

    return ThreadPoolExecutor(len(cores), "copies", spread)


def _cores_of(process: str) -> set[int]:
    """That any thread of a process may use; none of a process that has ended."""
    cores: set[int] = set()
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(OSError):  # the thread has ended
                cores |= os.sched_getaffinity(int(thread))
    return cores
