# SPDX-License-Identifier: Apache-2.0
"""Catch-up: which positions a segment must run besides the step's own, and running exactly those.

Every slot of the KV cache has a depth mark: how many segments its position has been through. A
position waits for segment m iff its mark is m; its state is in the side cache. When a step goes on
to segment m, what waits for it in the block tables of the batch joins the pass, its K/V go to the
paged cache, and what stops at an exit is put back with a new mark.

Marks, not private counters, are the truth, because prefix-cached blocks are shared: another request
may have completed a position since. And marks are in no order along a block table: vLLM keeps
several blocks of the same content and finds a prefix block by block, so a block in which positions
wait may stand before one that is complete. So a pass is made of ranges: each run of consecutive
positions that wait is a sequence of its own to the attention backend, with the block table of its
request, and attends to everything before it, of which all K/V are in the cache or written by the
same layer of the same pass. A position that is complete is never run, nor written, again.

A step ends for all of its sequences at once: at the first exit where none needs to go on. While one
goes on, the segment's weights are read anyway, and a position that rides along now is a position
that nobody has to catch up on later; stopping it would save nothing and cost a scatter, a gather
and new attention metadata.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vllm_nvium.model_executor.layers.side_cache import SideCache
from vllm_nvium.model_executor.ops.ragged import (
    passes_of,
    ragged_ranges,
    range_starts,
)
from vllm_nvium.model_executor.rows import Batch, Rows, select

# Below "vllm", because vLLM configures that logger only and other INFO lines are lost.
logger = logging.getLogger("vllm.nvium")

# Mark of a position that a pass of the present step is computing: it is neither complete nor does
# it wait, and its state is in that pass. No model has so many segments.
IN_FLIGHT = 255


class CatchUpError(RuntimeError):
    """The depth marks contradict what is known of a step. Nothing has been written: running on
    would compute with states of other positions."""


@dataclass(slots=True)
class Waiting:
    """Positions before the step's rows that are not complete, each slot once.

    Attributes:
        sequence, positions, slots: [W] int64, ascending by sequence and then by position.
        marks: [W] uint8, as they were when the step began.
    """

    sequence: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    marks: np.ndarray

    def at(self, segment: int) -> "Waiting":
        """Those that wait for `segment`."""
        chosen = self.marks == segment
        if chosen.all():
            return self
        return Waiting(
            self.sequence[chosen], self.positions[chosen], self.slots[chosen], self.marks[chosen]
        )


# Given the rows of a pass, makes the forward context (attention metadata, slot mapping) theirs.
EnterRows = Callable[[Rows], None]
# Runs one segment: states [T, H] and positions [T] in, [T, H] out.
Segment = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class CatchUp:
    """The side cache, and who has to run what.

    Args:
        side_cache: states and depth marks, indexed by the slots of the KV cache.
        num_segments: N; a position whose mark is N is complete.
        block_size: positions per block of the KV cache.
        enter_rows: called before a segment runs on rows other than those it ran on before.
        max_rows, max_ranges: most rows and ranges of one pass. vLLM has planned its memory, its
            compiled code and the buffers of its attention backends for `max_num_batched_tokens`
            and `max_num_seqs`.
    """

    def __init__(
        self,
        side_cache: SideCache,
        num_segments: int,
        block_size: int,
        enter_rows: EnterRows,
        max_rows: int,
        max_ranges: int,
    ) -> None:
        self.side_cache = side_cache
        self.num_segments = num_segments
        self.block_size = block_size
        self.enter_rows = enter_rows
        self.max_rows = max_rows
        self.max_ranges = max_ranges
        # How often a step went on because its states had no place to wait, and how often what
        # waited for a segment took more than one pass.
        self.steps_without_room = 0
        self.split_passes = 0
        # Rows of the last segment that was run, in all its passes.
        self.rows_run = 0
        self._entered: Rows | None = None
        self._waiting: Waiting | None = None

    def start(self, batch: Batch, positions: torch.Tensor) -> Rows:
        """The step's own rows, as vLLM scheduled them.

        They are marked as in flight: another request of this step may share such a position and
        must not take what its slot held before for its state.
        """
        num_rows = batch.num_rows
        slots_device = batch.slots_device[:num_rows]
        if slots_device.device.type == "cpu":
            slots = slots_device.numpy()
        else:  # reading them back would make the host wait for the device before each step
            sequence, host_positions, _ = ragged_ranges(batch.first, batch.last)
            slots = batch.slots_of(sequence, host_positions, self.block_size)
        self._check_slots(slots)
        self.side_cache.release(slots)  # of whoever had these blocks before
        self.side_cache.marks[slots] = IN_FLIGHT
        self._waiting = None
        self._entered = Rows(
            first=batch.first,
            last=batch.last,
            query_start=batch.query_start,
            slots=slots,
            slots_device=slots_device,
            positions=positions[:num_rows],
            block_table=batch.block_table_device,
        )
        return self._entered

    def stop(self, rows: Rows, state: torch.Tensor, depth: int) -> None:
        """The step ends here: states and marks of its rows wait in the side cache.

        Args:
            rows: the pass that just ended.
            state: [T, H] residual stream after it, model dtype.
            depth: segments that the rows have been through.
        """
        self.side_cache.write_states(rows.slots, rows.slots_device, state)
        self.side_cache.marks[rows.slots] = depth

    def complete(self, rows: Rows) -> None:
        """The step ends here, behind the last segment: its rows need no states any more."""
        self.side_cache.marks[rows.slots] = self.num_segments

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

    def run(
        self, batch: Batch, rows: Rows, state: torch.Tensor, segment: int, forward: Segment
    ) -> tuple[Rows, torch.Tensor]:
        """Runs a segment on the rows of the last pass and on what waits for it.

        Args:
            rows, state: the pass that just ended, [T, H] after it.
            segment: number of the segment that comes next; forward: runs it.

        Returns:
            the rows and their states [T', H] after the segment. Rows that were in flight before are
            among them; what waited is too, where it fits into one pass.
        """
        waiting = self._waiting_for(batch, rows, segment)
        self.rows_run = len(rows.slots)
        if waiting is None:
            return rows, self._pass(rows, state, forward)
        self.rows_run += len(waiting.slots)
        sequence, positions = rows.host_rows()
        sequence = np.concatenate((waiting.sequence, sequence))
        positions = np.concatenate((waiting.positions, positions))
        slots = np.concatenate((waiting.slots, rows.slots))
        order = np.lexsort((positions, sequence))
        if self._is_one_pass(sequence[order], positions[order]):
            joined = self._rows(batch, sequence[order], positions[order], slots[order])
            states = torch.cat([self.side_cache.read_states(waiting.slots), state])
            self.side_cache.release(waiting.slots)
            self.side_cache.marks[waiting.slots] = IN_FLIGHT
            return joined, self._pass(joined, select(states, order), forward)

        self.split_passes += 1
        num_waiting = len(waiting.slots)
        output: torch.Tensor | None = None
        for chosen in passes_of(sequence, positions, self.max_rows, self.max_ranges):
            part = self._rows(batch, sequence[chosen], positions[chosen], slots[chosen])
            # Which of the pass wait and stay in the side cache, and which are in flight.
            waits = chosen < num_waiting
            kept, moving = np.flatnonzero(waits), np.flatnonzero(~waits)
            states = torch.cat(
                [
                    self.side_cache.read_states(part.slots[kept]),
                    select(state, chosen[moving] - num_waiting),
                ]
            )
            order = np.argsort(np.concatenate((kept, moving)))
            states = self._pass(part, select(states, order), forward)
            self._advance(part.slots[kept], select(states, kept), segment + 1)
            if output is None:
                output = states.new_empty(len(rows.slots), states.shape[1])
            target = torch.from_numpy(chosen[moving] - num_waiting).to(output.device)
            output.index_copy_(0, target, select(states, moving))
        assert output is not None
        return rows, output

    def _is_one_pass(self, sequence: np.ndarray, positions: np.ndarray) -> bool:
        """Whether rows [T] fit into one pass. Found out before anything is made for them: a block
        table of all ranges may be larger than all that vLLM has planned for."""
        if len(positions) > self.max_rows:
            return False
        return len(range_starts(sequence, positions)) <= self.max_ranges

    def _pass(self, rows: Rows, state: torch.Tensor, forward: Segment) -> torch.Tensor:
        if rows is not self._entered:
            self.enter_rows(rows)
            self._entered = rows
        # A module that runs as a captured graph returns as many rows as that was captured for.
        return forward(state, rows.positions)[: len(rows.slots)]

    def _advance(self, slots: np.ndarray, states: torch.Tensor, depth: int) -> None:
        """States that stay in the side cache after one more segment."""
        if depth == self.num_segments:
            self.side_cache.release(slots)
        else:
            self.side_cache.replace_states(slots, states)
            assert self._waiting is not None
            self._waiting.marks[np.isin(self._waiting.slots, slots)] = depth
        self.side_cache.marks[slots] = depth

    def _waiting_for(self, batch: Batch, rows: Rows, segment: int) -> Waiting | None:
        """What waits for a segment, or None. Nothing starts to wait while a step runs, so marks are
        read once."""
        if self._waiting is None:
            self._waiting = self._find_waiting(batch, rows)
        waiting = self._waiting.at(segment)
        return waiting if len(waiting.slots) else None

    def _find_waiting(self, batch: Batch, rows: Rows) -> Waiting:
        sequence, positions, _ = ragged_ranges(
            np.minimum(batch.complete, batch.first), batch.first - 1
        )
        slots = batch.slots_of(sequence, positions, self.block_size)
        marks = self.side_cache.marks[slots]
        incomplete = np.flatnonzero(marks != self.num_segments)
        if len(incomplete) and batch.num_requests > 1:
            # Requests that share a block share what waits in it: the first of them runs it.
            incomplete = incomplete[np.unique(slots[incomplete], return_index=True)[1]]
            incomplete.sort()
        found = Waiting(
            sequence[incomplete], positions[incomplete], slots[incomplete], marks[incomplete]
        )
        self._check(batch, rows, found)
        return found

    def _check(self, batch: Batch, rows: Rows, found: Waiting) -> None:
        """Raises CatchUpError for a position that cannot be run and is not known to be complete."""
        self._check_slots(found.slots)
        computing = found.marks == IN_FLIGHT
        wrong = ((found.marks == 0) | (found.marks > self.num_segments)) & ~computing
        if computing.any():  # by another request of this step
            wrong |= computing & ~np.isin(found.slots, rows.slots)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise CatchUpError(
                f"position {found.positions[row]} of request number {found.sequence[row]} in this "
                f"step is in slot {found.slots[row]}, whose depth mark is {found.marks[row]}: it "
                f"was never computed, or not for this position; {len(rows.slots)} rows, first "
                f"{batch.first.tolist()}, complete {batch.complete.tolist()}"
            )

    def _check_slots(self, slots: np.ndarray) -> None:
        """vLLM gives its block 0 to nobody, and a negative index would count from the end."""
        if len(slots) and (slots.min() < self.block_size or slots.max() >= self.num_slots):
            raise CatchUpError(
                f"rows are in slots {slots.min()} to {slots.max()}, but sequences have "
                f"{self.block_size} to {self.num_slots - 1}"
            )

    @property
    def num_slots(self) -> int:
        return len(self.side_cache.marks)

    def _rows(
        self, batch: Batch, sequence: np.ndarray, positions: np.ndarray, slots: np.ndarray
    ) -> Rows:
        """Rows [T] (ascending by sequence and then by position) as ranges."""
        starts = range_starts(sequence, positions)
        query_start = np.append(starts, len(slots)).astype(np.int32)
        owners = sequence[starts]
        device = batch.slots_device.device
        is_batch = np.array_equal(owners, np.arange(batch.num_requests))
        block_table = batch.block_table_device
        return Rows(
            first=positions[starts],
            last=positions[query_start[1:] - 1],
            query_start=query_start,
            slots=slots,
            slots_device=torch.from_numpy(slots).to(device, non_blocking=True),
            positions=torch.from_numpy(positions).to(device, non_blocking=True),
            block_table=block_table if is_batch else select(block_table, owners),
            sequence=None if is_batch else owners,
        )
