# SPDX-License-Identifier: Apache-2.0
"""Catch-up: which positions of which sequences a segment must run, and running exactly those.

A sequence's rows at a segment are the contiguous range [frontier, newest position]; their states
come from the side cache, their K/V go to the paged cache, and what stops at an exit is put back
with a depth mark. Marks, not private counters, are the truth, because prefix-cached blocks are
shared: another sequence may have completed a position since.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_nvium.model_executor.layers.side_cache import SideCache
from vllm_nvium.model_executor.ops.ragged import frontiers, ragged_ranges, slots_of


@dataclass(slots=True)
class Batch:
    """What a model runner knows of one engine step; host arrays, one entry per request.

    Attributes:
        query_start: [R + 1] int32, where each request's rows start among the step's rows.
        first, last: [R] int64, positions of each request's first and newest row.
        complete: [R] int64, leading positions known to be through every segment; 0 if unknown.
        block_table: [R, blocks] int32, on the host.
        block_table_device: the same as a tensor on the model's device.
        slots_device: [T] int64, the slots of the step's rows on the model's device.
    """

    query_start: np.ndarray
    first: np.ndarray
    last: np.ndarray
    complete: np.ndarray
    block_table: np.ndarray
    block_table_device: torch.Tensor
    slots_device: torch.Tensor

    @property
    def num_requests(self) -> int:
        return len(self.first)

    @property
    def num_rows(self) -> int:
        return int(self.query_start[-1])


@dataclass(slots=True)
class Rows:
    """The rows of one pass through one segment.

    Attributes:
        requests: [S] int64, which requests of the batch take part, or None for all of them.
        first, last: [S] int64, each one's contiguous range of positions.
        query_start: [S + 1] int32.
        slots: [T] int64 on the host; slots_device, positions: [T] int64 on the model's device.
        block_table: [S, blocks] int32 on the model's device.
    """

    requests: np.ndarray | None
    first: np.ndarray
    last: np.ndarray
    query_start: np.ndarray
    slots: np.ndarray
    slots_device: torch.Tensor
    positions: torch.Tensor
    block_table: torch.Tensor

    @property
    def num_sequences(self) -> int:
        return len(self.first)

    @property
    def newest_is_only(self) -> bool:
        """True when every sequence has one row, so rows and sequences coincide."""
        return len(self.slots) == len(self.first)

    def newest(self) -> np.ndarray:
        """[S] int64: the row of each sequence's newest position."""
        return self.query_start[1:].astype(np.int64) - 1


# Given the rows of a pass, makes the forward context (attention metadata, slot mapping) theirs.
EnterRows = Callable[[Rows], None]


class CatchUp:
    """One engine step's view of the side cache and of who has to run what.

    Args:
        side_cache: states and depth marks, indexed by the slots of the KV cache.
        num_segments: N; a position whose mark is N is complete.
        block_size: positions per block of the KV cache.
        enter_rows: called before a segment runs on rows other than the step's own.
    """

    def __init__(
        self, side_cache: SideCache, num_segments: int, block_size: int, enter_rows: EnterRows
    ) -> None:
        self.side_cache = side_cache
        self.num_segments = num_segments
        self.block_size = block_size
        self.enter_rows = enter_rows

    def start(self, batch: Batch, positions: torch.Tensor) -> Rows:
        """The step's own rows, as vLLM scheduled them.

        They are marked complete at once, which for now means "in flight": whoever shares such a
        position with its sequence must not also run it. A row that stops says so in `stop`, before
        anybody looks at marks again.
        """
        num_rows = batch.num_rows
        slots_device = batch.slots_device[:num_rows]
        slots = slots_device.cpu().numpy()
        self.side_cache.set_marks(slots, self.num_segments)
        return Rows(
            requests=None,
            first=batch.first,
            last=batch.last,
            query_start=batch.query_start,
            slots=slots,
            slots_device=slots_device,
            positions=positions[:num_rows],
            block_table=batch.block_table_device,
        )

    def stop(self, rows: Rows, state: torch.Tensor, depth: int) -> None:
        """Puts the states of rows that have been through `depth` segments into the side cache.

        Args:
            rows: the pass that just ended.
            state: [T, H] residual stream after it, model dtype.
        """
        self.side_cache.write_states(rows.slots_device, state)
        self.side_cache.set_marks(rows.slots, depth)

    def deferred(self, batch: Batch, rows: Rows, going: np.ndarray, segment: int) -> np.ndarray:
        """First position of each continuing sequence that has not been through `segment`.

        Args:
            rows: the pass that just ended.
            going: [G] indices into the sequences of `rows` that continue.

        Returns:
            [G] int64, at most `rows.first`.
        """
        requests = going if rows.requests is None else rows.requests[going]
        complete = batch.complete[requests]
        first = rows.first[going]
        if (complete >= first).all():
            return first
        complete = np.minimum(complete, first)
        sequence, positions, query_start = ragged_ranges(complete, first - 1)
        slots = slots_of(batch.block_table, requests[sequence], positions, self.block_size)
        marks = self.side_cache.get_marks(slots)
        return frontiers(marks, complete, first, query_start, segment)

    def continue_with(
        self,
        batch: Batch,
        rows: Rows,
        going: np.ndarray,
        frontier: np.ndarray,
    ) -> tuple[Rows, torch.Tensor]:
        """Rows and states of the next pass, when they differ from those of the last one.

        The states of the last pass must be in the side cache (`stop`): it is where rows change
        hands, so one gather serves the sequences' own rows and the positions that join them.

        Returns:
            the rows, already marked in flight and entered, and their states [T, H].
        """
        requests = going if rows.requests is None else rows.requests[going]
        last = rows.last[going]
        sequence, positions, query_start = ragged_ranges(frontier, last)
        slots = slots_of(batch.block_table, requests[sequence], positions, self.block_size)
        device = rows.slots_device.device
        slots_device = torch.from_numpy(slots).to(device, non_blocking=True)
        if len(requests) == batch.num_requests:
            block_table = batch.block_table_device
        else:
            block_table = batch.block_table_device[torch.from_numpy(requests).to(device)]
        next_rows = Rows(
            requests=requests,
            first=frontier,
            last=last,
            query_start=query_start,
            slots=slots,
            slots_device=slots_device,
            positions=torch.from_numpy(positions).to(device, non_blocking=True),
            block_table=block_table,
        )
        # After `stop`, so that a position which stopped with one sequence and goes on with another
        # ends up in flight.
        self.side_cache.set_marks(slots, self.num_segments)
        state = self.side_cache.read_states(slots_device)
        self.enter_rows(next_rows)
        return next_rows, state


def common_attention_metadata(rows: Rows) -> Any:
    """vLLM's description of a ragged batch, for exactly these rows (causal, aligned to the end)."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    device = rows.slots_device.device
    query_start_cpu = torch.from_numpy(rows.query_start)
    seq_lens_np = (rows.last + 1).astype(np.int32)
    seq_lens_cpu = torch.from_numpy(seq_lens_np)
    return CommonAttentionMetadata(
        query_start_loc=query_start_cpu.to(device, non_blocking=True),
        query_start_loc_cpu=query_start_cpu,
        seq_lens=seq_lens_cpu.to(device, non_blocking=True),
        seq_lens_cpu_upper_bound=seq_lens_cpu,
        num_reqs=rows.num_sequences,
        num_actual_tokens=len(rows.slots),
        max_query_len=int((rows.last - rows.first).max()) + 1,
        max_seq_len=int(seq_lens_np.max()),
        block_table_tensor=rows.block_table,
        slot_mapping=rows.slots_device,
        causal=True,
        positions=rows.positions,
    )
