# SPDX-License-Identifier: Apache-2.0
"""Weights as FBGEMM multiplies with them, through torch's quantised operators. They pack in one
thread, so that several weights are packed at a time, while torch has one engine for all threads.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Engine:
    """torch's engine for quantised operators, `fbgemm` while anybody packs.

    Attributes:
        own: what it was before, and will be again; users: who packs now.
    """

    def __init__(self) -> None:
        self.lock, self.users, self.own = threading.Lock(), 0, ""

    @contextmanager
    def is_fbgemm(self) -> Iterator[None]:
        quantised = torch.backends.quantized
        with self.lock:
            if self.users == 0:
                self.own, quantised.engine = quantised.engine, "fbgemm"
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    quantised.engine = self.own


_ENGINE = _Engine()


def quantised(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Levels [N, K] int8 and scales [N] as one of torch's quantised tensors."""
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is going to move quantised tensors elsewhere
        return torch._make_per_channel_quantized_tensor(levels, scales.double(), zeros, 0)


def packed(weight: torch.Tensor) -> Any:
    """A quantised weight [N, K] as FBGEMM wants it.

    Raises:
        RuntimeError: torch was built without FBGEMM.
    """
    with _ENGINE.is_fbgemm():
        return torch.ops.quantized.linear_prepack(weight, None)
