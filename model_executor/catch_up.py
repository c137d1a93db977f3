# SPDX-License-Identifier: Apache-2.0
"""Catch-up: which positions of which sequences a segment must run, and running exactly those.

A sequence's rows at a segment are the contiguous range [frontier, newest position]; their states
come from the side cache, their K/V go to the paged cache, and what stops at an exit is put back
with a depth mark. Marks, not private counters, are the truth, because prefix-cached blocks are
shared: another sequence may have completed a position since.

A step ends for all of its sequences at once: at the first exit where none needs to go on. While one
goes on, the segment's weights are read anyway, and a position that rides along now is a position
that nobody has to catch up on later; stopping it would save nothing and cost a scatter, a gather
and new attention metadata.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_nvium.model_executor.layers.side_cache import SideCache
from vllm_nvium.model_executor.ops.ragged import frontiers, ragged_ranges, slots_of

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup

# Below "vllm", because vLLM configures that logger only and other INFO lines are lost.
logger = logging.getLogger("vllm.nvium")


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
    """The rows of one pass through one segment: a contiguous range of positions per request.

    Attributes:
        first, last: [R] int64, each request's range.
        query_start: [R + 1] int32, where it starts among the rows.
        slots: [T] int64 on the host; slots_device, positions: [T] int64 on the model's device.
        block_table: [R, blocks] int32 on the model's device.
    """

    first: np.ndarray
    last: np.ndarray
    query_start: np.ndarray
    slots: np.ndarray
    slots_device: torch.Tensor
    positions: torch.Tensor
    block_table: torch.Tensor

    def newest(self) -> np.ndarray:
        """[R] int64: the row of each request's newest position."""
        return self.query_start[1:].astype(np.int64) - 1


# Given the rows of a pass, makes the forward context (attention metadata, slot mapping) theirs.
EnterRows = Callable[[Rows], None]


class CatchUp:
    """The side cache, and who has to run what.

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
        # How often a step went on because its states had no place to wait.
        self.steps_without_room = 0

    def start(self, batch: Batch, positions: torch.Tensor) -> Rows:
        """The step's own rows, as vLLM scheduled them.

        They are marked complete at once, which for now means "in flight": another request of this
        step may share such a position and must not read a stale mark for it. If the step stops
        early, `stop` says so before anybody looks at marks again.
        """
        num_rows = batch.num_rows
        slots_device = batch.slots_device[:num_rows]
        if slots_device.device.type == "cpu":
            slots = slots_device.numpy()
        else:  # reading them back would make the host wait for the device before each step
            sequence, host_positions, _ = ragged_ranges(batch.first, batch.last)
            slots = slots_of(batch.block_table, sequence, host_positions, self.block_size)
        self.side_cache.release(slots)  # of whoever had these blocks before
        self.side_cache.marks[slots] = self.num_segments
        return Rows(
            first=batch.first,
            last=batch.last,
            query_start=batch.query_start,
            slots=slots,
            slots_device=slots_device,
            positions=positions[:num_rows],
            block_table=batch.block_table_device,
        )

    def stop(self, rows: Rows, state: torch.Tensor, depth: int) -> None:
        """The step ends here: states and marks of its rows wait in the side cache.

        Args:
            rows: the pass that just ended.
            state: [T, H] residual stream after it, model dtype.
            depth: segments that the rows have been through.
        """
        self.side_cache.write_states(rows.slots, rows.slots_device, state)
        self.side_cache.marks[rows.slots] = depth

    def has_room(self, rows: Rows) -> bool:
        """Whether `stop` can keep the states of these rows; if not, the step has to go on."""
        if self.side_cache.has_room(len(rows.slots)):
            return True
        if self.steps_without_room == 0:
            logger.info(
                "the side cache is full of waiting positions: steps that could end early go on "
                "until some are complete (exact, but slower); --nvium-max-deferred bounds how many "
                "wait"
            )
        self.steps_without_room += 1
        return False

    def join(
        self, batch: Batch, rows: Rows, state: torch.Tensor, segment: int
    ) -> tuple[Rows, torch.Tensor]:
        """Rows and states for the next segment: those of the last pass and what waits there.

        Args:
            rows, state: the pass that just ended, [T, H] after it.
            segment: the one that comes next.

        Returns:
            the rows, in flight and entered into the forward context, and their states [T, H]. The
            arguments themselves when nothing waits.
        """
        complete = np.minimum(batch.complete, rows.first)
        if (complete == rows.first).all():
            return rows, state
        sequence, positions, query_start = ragged_ranges(complete, rows.first - 1)
        slots = slots_of(batch.block_table, sequence, positions, self.block_size)
        marks = self.side_cache.marks[slots]
        frontier = frontiers(marks, complete, rows.first, query_start, segment)
        if (frontier == rows.first).all():
            return rows, state

        sequence, positions, query_start = ragged_ranges(frontier, rows.last)
        slots = slots_of(batch.block_table, sequence, positions, self.block_size)
        waiting = positions < rows.first[sequence]  # [T] bool
        in_flight = ~waiting
        # Another request of this step may be computing what this one takes for its prefix: such a
        # position waits nowhere, its state is in that request's rows.
        shared = waiting & (self.side_cache.marks[slots] == self.num_segments)
        waiting &= ~shared
        waiting_slots = slots[waiting]
        joined_state = torch.cat([self.side_cache.read_states(waiting_slots), state])
        if batch.num_requests > 1:  # the rows of each request follow each other
            order = np.empty(len(slots), dtype=np.int64)
            order[waiting] = np.arange(len(waiting_slots))
            order[in_flight] = np.arange(len(waiting_slots), len(waiting_slots) + len(rows.slots))
            if shared.any():
                by_slot = np.argsort(rows.slots)
                found = np.searchsorted(rows.slots, slots[shared], sorter=by_slot)
                order[shared] = len(waiting_slots) + by_slot[found]
            joined_state = joined_state.index_select(0, torch.from_numpy(order).to(state.device))
        self.side_cache.release(waiting_slots)
        device = rows.slots_device.device
        slots_device = torch.from_numpy(slots).to(device, non_blocking=True)
        joined = Rows(
            first=frontier,
            last=rows.last,
            query_start=query_start,
            slots=slots,
            slots_device=slots_device,
            positions=torch.from_numpy(positions).to(device, non_blocking=True),
            block_table=rows.block_table,
        )
        self.side_cache.marks[waiting_slots] = self.num_segments
        self.enter_rows(joined)
        return joined, joined_state


def enter_rows(groups: "Sequence[AttentionGroup]", rows: Rows) -> None:
    """Makes the forward context describe `rows`, with the backends' own metadata builders.

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
