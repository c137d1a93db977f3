# SPDX-License-Identifier: Apache-2.0
"""Rows of some sequences, and vLLM's forward context for exactly these rows: what a pass needs that
runs on other rows than those that vLLM scheduled. Both methods' passes are made of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_nvium.model_executor.ops.ragged import ragged_ranges, slots_of

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup


@dataclass(slots=True)
class Batch:
    """What a model runner knows of one engine step; host arrays, one entry per request.

    Attributes:
        query_start: [R + 1] int32, where each request's rows start among the step's rows.
        first, last: [R] int64, positions of each request's first and newest row.
        complete: [R] int64, leading positions known to be through every segment; 0 if unknown.
        block_table: [rows, blocks] int32, on the host; read by `slots_of`.
        block_table_device: [R, blocks] int32 on the model's device.
        slots_device: [T] int64, the slots of the step's rows on the model's device.
        table_rows: [R] int64, the row of `block_table` that each request has; None where request
            and row have the same number.
    """

    query_start: np.ndarray
    first: np.ndarray
    last: np.ndarray
    complete: np.ndarray
    block_table: np.ndarray
    block_table_device: torch.Tensor
    slots_device: torch.Tensor
    table_rows: np.ndarray | None = None

    def slots_of(self, sequence: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
        """[T] int64: cache slots of positions [T] int64 of requests [T] int64, see `ragged.py`."""
        rows = sequence if self.table_rows is None else self.table_rows[sequence]
        return slots_of(self.block_table, rows, positions, block_size)

    @property
    def num_requests(self) -> int:
        return len(self.first)

    @property
    def num_rows(self) -> int:
        return int(self.query_start[-1])


@dataclass(slots=True)
class Rows:
    """The rows of one pass: ranges of consecutive positions, Q of them.

    Attributes:
        first, last: [Q] int64, each range.
        query_start: [Q + 1] int32, where it starts among the rows.
        slots: [T] int64 on the host; slots_device, positions: [T] int64 on the model's device.
        block_table: [Q, blocks] int32 on the model's device.
        sequence: [Q] int64, the request that each range belongs to, ascending; None where range and
            request have the same number.
    """

    first: np.ndarray
    last: np.ndarray
    query_start: np.ndarray
    slots: np.ndarray
    slots_device: torch.Tensor
    positions: torch.Tensor
    block_table: torch.Tensor
    sequence: np.ndarray | None = None

    def newest(self) -> np.ndarray:
        """[R] int64: the row of each request's newest position."""
        ends = self.query_start[1:].astype(np.int64) - 1
        if self.sequence is None:
            return ends
        return ends[np.flatnonzero(np.diff(self.sequence, append=self.sequence[-1] + 1))]

    def host_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """[T] int64 each: the request and the position of every row."""
        range_, positions, _ = ragged_ranges(self.first, self.last)
        return range_ if self.sequence is None else self.sequence[range_], positions


def select(rows: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    """Rows of a [T, ...] tensor by host indices [n] int64; itself when that is all in order."""
    if len(index) == len(rows) and (index[1:] > index[:-1]).all():
        return rows
    return rows.index_select(0, torch.from_numpy(index).to(rows.device))


# What of vLLM's forward context is about the rows of a pass.
OF_ROWS = ("attn_metadata", "slot_mapping", "cudagraph_runtime_mode", "is_padding")


@contextmanager
def own_forward_context() -> Iterator[None]:
    """While passes run on rows of their own; afterwards the forward context is the caller's again,
    whatever happened."""
    context = get_forward_context()
    given = {name: getattr(context, name) for name in OF_ROWS}
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(context, name, value)


def enter_rows(groups: "Sequence[AttentionGroup]", rows: Rows) -> None:
    """Makes the forward context describe `rows`, with the backends' own metadata builders. To be
    called inside `own_forward_context`.

    Args:
        groups: the groups of layers that compute attention (not the side cache's).
    """
    common = common_attention_metadata(rows)
    metadata: dict[str, Any] = {}
    for group in groups:
        metadata.update(dict.fromkeys(group.layer_names, group.build_metadata(common)))
    context = get_forward_context()
    context.attn_metadata = metadata
    context.slot_mapping = dict.fromkeys(metadata, rows.slots_device)
    # vLLM's says which rows of its own batch have no token, so that experts leave them out.
    context.is_padding = None
    # Graphs were captured for batches as vLLM schedules them, not for these rows.
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE


def common_attention_metadata(rows: Rows) -> Any:
    """vLLM's description of a ragged batch, for exactly these rows (causal, aligned to the end)."""
    device = rows.slots_device.device
    query_start_cpu = torch.from_numpy(rows.query_start)
    seq_lens_np = (rows.last + 1).astype(np.int32)
    seq_lens_cpu = torch.from_numpy(seq_lens_np)
    return CommonAttentionMetadata(
        query_start_loc=query_start_cpu.to(device, non_blocking=True),
        query_start_loc_cpu=query_start_cpu,
        seq_lens=seq_lens_cpu.to(device, non_blocking=True),
        seq_lens_cpu_upper_bound=seq_lens_cpu,
        num_reqs=len(rows.first),
        num_actual_tokens=len(rows.slots),
        max_query_len=int((rows.last - rows.first).max()) + 1,
        max_seq_len=int(seq_lens_np.max()),
        block_table_tensor=rows.block_table,
        slot_mapping=rows.slots_device,
        causal=True,
        positions=rows.positions,
    )
