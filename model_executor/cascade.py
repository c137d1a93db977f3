# SPDX-License-Identifier: Apache-2.0
"""One engine step of an N-vium model: segments, exits, and who goes on.

The loop in `run_cascade` reads like the paper: run a segment, let the newest token of every
sequence draw at the exit, stop those that left, and take along what waits where the others go on.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_nvium.model_executor.catch_up import Batch, CatchUp, Rows
from vllm_nvium.model_executor.ops.head_rows import HeadRows
from vllm_nvium.model_executor.ops.mixture import exit_log_weights

if TYPE_CHECKING:
    from vllm_nvium.model_executor.models.nvium import NviumForCausalLM

UNDECIDED = -1
# Rounding of a float32 sum of probabilities: a lead this small is not yet a lead.
LEAD_TOLERANCE = 1e-5


@dataclass(slots=True)
class Sampling:
    """How each request's newest token chooses its head; host arrays, one entry per request.

    Attributes:
        thresholds: [R, N-1] float64, leave at exit k iff `e_k - c_k > threshold`.
        may_stop: [R] bool, whether leaving also ends this step for the sequence. False while it
            has prompt rows, at its deferral cap, or when its output needs every head.
        mixture: [R] bool, hand the sampler `log p_mix` instead of one head's logits.
        greedy: [R] bool, of those, the ones that only need the argmax of `p_mix`.
        all_rows: [R] bool, every row of the step needs `log p_mix` (prompt logprobs).
    """

    thresholds: np.ndarray
    may_stop: np.ndarray
    mixture: np.ndarray
    greedy: np.ndarray
    all_rows: np.ndarray
    wide: bool = False


@dataclass(slots=True)
class Step:
    """Everything one forward pass needs besides its tokens, handed to the model by a runner."""

    request_ids: list[str]
    batch: Batch
    sampling: Sampling
    catch_up: CatchUp
    # Filled in by the cascade: the exit each request's newest token left at (N-1 = final head) and
    # the segments run for it, for metrics and tests.
    exits: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    depths: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def run_cascade(
    model: "NviumForCausalLM", step: Step, input_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Runs one engine step.

    Args:
        input_ids, positions: [T] (or longer, when padded), vLLM's flat batch.

    Returns:
        [T, H] head inputs, or packed `HeadRows` [T, W] when some row needs the mixture. Only rows
        that vLLM will sample from, or asked prompt logprobs for, hold anything.
    """
    batch, catch_up, num_exits = step.batch, step.catch_up, len(model.exits)
    rows = catch_up.start(batch, positions)
    heads: _NarrowHeads | _WideHeads = (
        _WideHeads(model, step) if step.sampling.wide else _NarrowHeads(model, step)
    )
    step.exits = np.full(batch.num_requests, UNDECIDED, dtype=np.int64)
    step.depths = np.full(batch.num_requests, num_exits + 1, dtype=np.int64)
    state = model.segments[0](input_ids[: batch.num_rows], rows.positions)

    for k in range(num_exits):
        stop = heads.at_exit(k, rows, state)  # [S] bool, or None when nobody stops
        num_stopped = 0 if stop is None else int(np.count_nonzero(stop))
        going = None if num_stopped == 0 else np.flatnonzero(~stop)
        if num_stopped:
            catch_up.stop(rows, state, depth=k + 1)
            stopped = np.flatnonzero(stop)
            step.depths[stopped if rows.requests is None else rows.requests[stopped]] = k + 1
            if len(going) == 0:
                return heads.output(state)
        everyone = np.arange(rows.num_sequences) if going is None else going
        frontier = catch_up.deferred(batch, rows, everyone, segment=k + 1)
        if num_stopped or not np.array_equal(frontier, rows.first):
            if not num_stopped:
                catch_up.stop(rows, state, depth=k + 1)
            rows, state = catch_up.continue_with(batch, rows, everyone, frontier)
        state = model.segments[k + 1](state, rows.positions)

    heads.at_end(rows, state)
    return heads.output(state)


def _requests(rows: Rows, batch: Batch) -> np.ndarray:
    return np.arange(batch.num_requests) if rows.requests is None else rows.requests


def _take(state: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    """Rows of a [T, H] tensor by host indices, or the tensor itself when that is all of them."""
    if len(index) == len(state):
        return state
    return state.index_select(0, torch.from_numpy(index).to(state.device))


class _NarrowHeads:
    """Every sampled row is spoken for by one head: the input of the unembedding is enough."""

    def __init__(self, model: "NviumForCausalLM", step: Step) -> None:
        self.model, self.step = model, step
        self.result: torch.Tensor | None = None

    def _emit(self, requests: np.ndarray, head_inputs: torch.Tensor) -> None:
        """Puts [n, H] head inputs of the newest rows of `requests` into the step's output."""
        batch = self.step.batch
        if self.result is None:
            if len(requests) == batch.num_rows:  # one row each, all at once: no copy
                self.result = head_inputs
                return
            self.result = head_inputs.new_zeros(batch.num_rows, head_inputs.shape[1])
        newest = batch.query_start[1:][requests].astype(np.int64) - 1
        self.result[torch.from_numpy(newest).to(head_inputs.device)] = head_inputs

    def at_exit(self, k: int, rows: Rows, state: torch.Tensor) -> np.ndarray | None:
        """Draws exit k for the newest token of every sequence in the pass that has no head yet.

        Returns:
            [S] bool, which sequences stop here; None when none does.
        """
        step, exit_ = self.step, self.model.exits[k]
        sampling = step.sampling
        requests = _requests(rows, step.batch)
        thresholds = sampling.thresholds[requests, k]
        open_ = step.exits[requests] == UNDECIDED
        normed: torch.Tensor | None = None
        margin = exit_.router.constant_margin
        if margin is None:
            normed = exit_.norm(_take(state, rows.newest()))
            margins = exit_.router(normed).cpu().numpy()
            leave = open_ & (margins > thresholds)
        else:
            leave = open_ & (margin > thresholds)
        if not leave.any():
            return None
        leaving = np.flatnonzero(leave)
        if normed is None:
            normed = exit_.norm(_take(state, rows.newest()[leaving]))
        else:
            normed = _take(normed, leaving)
        step.exits[requests[leaving]] = k
        self._emit(requests[leaving], exit_.head_input(normed))
        stop = leave & sampling.may_stop[requests]
        return stop if stop.any() else None

    def at_end(self, rows: Rows, state: torch.Tensor) -> None:
        """The final head speaks for every sequence that left nowhere."""
        step = self.step
        requests = _requests(rows, step.batch)
        staying = np.flatnonzero(step.exits[requests] == UNDECIDED)
        if len(staying) == 0:
            return
        newest = rows.newest()
        newest = newest if len(staying) == len(newest) else newest[staying]
        step.exits[requests[staying]] = len(self.model.exits)
        self._emit(requests[staying], self.model.final_head(_take(state, newest)))

    def output(self, state: torch.Tensor) -> torch.Tensor:
        if self.result is None:
            return state.new_zeros(self.step.batch.num_rows, state.shape[1])
        return self.result


class _WideHeads:
    """Some rows need several heads and the weights of the exits; see `HeadRows`.

    Slower than `_NarrowHeads` and only used in steps that hold such a row. Requests spoken for by
    one head travel in the same rows.
    """

    def __init__(self, model: "NviumForCausalLM", step: Step) -> None:
        self.model, self.step = model, step
        batch, sampling = step.batch, step.sampling
        self.num_exits = len(model.exits)
        # [M] every output row that gets the mixture, as (request, distance from its newest row).
        request = np.repeat(np.arange(batch.num_requests), np.diff(batch.query_start))
        from_newest = batch.query_start[1:][request] - 1 - np.arange(batch.num_rows)
        chosen = sampling.all_rows[request] | (sampling.mixture[request] & (from_newest == 0))
        self.output_rows = np.flatnonzero(chosen)
        self.request, self.from_newest = request[chosen], from_newest[chosen]
        self.margins = torch.empty(len(self.output_rows), self.num_exits, dtype=torch.float32)
        self.rows: HeadRows | None = None
        self.mass = np.zeros(batch.num_requests)  # weight of the heads already summed up
        self.summed: dict[int, torch.Tensor] = {}  # request -> [V] float32, sum of pi_k q_k
        # request -> (weight, head, head input) not yet summed up
        self.waiting: dict[int, list[tuple[float, int, torch.Tensor]]] = {}

    def _packed(self, state: torch.Tensor) -> HeadRows:
        if self.rows is None:
            num_rows = self.step.batch.num_rows
            self.rows = HeadRows(num_rows, self.num_exits + 1, state.shape[1], state)
            self.margins = self.margins.to(state.device)
        return self.rows

    def _rows_in_pass(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Which mixture rows take part in the pass ([m]), and which of its rows they are ([m])."""
        end = np.full(self.step.batch.num_requests, -1, dtype=np.int64)
        end[_requests(rows, self.step.batch)] = rows.newest()
        present = np.flatnonzero(end[self.request] >= 0)
        return present, end[self.request[present]] - self.from_newest[present]

    def at_exit(self, k: int, rows: Rows, state: torch.Tensor) -> np.ndarray | None:
        step, exit_, packed = self.step, self.model.exits[k], self._packed(state)
        sampling = step.sampling
        present, in_pass = self._rows_in_pass(rows)
        if len(present):
            normed = exit_.norm(_take(state, in_pass))
            head_inputs = exit_.head_input(normed)
            device = state.device
            packed.heads[torch.from_numpy(self.output_rows[present]).to(device), k] = head_inputs
            margins = exit_.margins(normed)
            self.margins[torch.from_numpy(present).to(device), k] = margins
            self._sum_up(k, present, head_inputs)

        requests = _requests(rows, step.batch)
        newest = rows.newest()
        normed = exit_.norm(_take(state, newest))
        margins_host = exit_.margins(normed).cpu().numpy()
        open_ = (step.exits[requests] == UNDECIDED) & ~sampling.mixture[requests]
        leave = open_ & (margins_host > sampling.thresholds[requests, k])
        leaving = np.flatnonzero(leave)
        if len(leaving):
            step.exits[requests[leaving]] = k
            self._emit(packed, requests[leaving], k, exit_.head_input(_take(normed, leaving)))
        decided = self._decide(k, packed, requests)
        stop = (leave | decided) & sampling.may_stop[requests]
        return stop if stop.any() else None

    def _emit(
        self, packed: HeadRows, requests: np.ndarray, head: int, inputs: torch.Tensor
    ) -> None:
        newest = self.step.batch.query_start[1:][requests].astype(np.int64) - 1
        index = torch.from_numpy(newest).to(inputs.device)
        packed.heads[index, head] = inputs
        packed.fields[index, 0] = head

    def _sum_up(self, k: int, present: np.ndarray, head_inputs: torch.Tensor) -> None:
        """Remembers `pi_k` and head k of greedy requests; see `_decide`."""
        log_weights = exit_log_weights(self.margins[:, : k + 1]).double().exp().cpu().numpy()
        for i, j in enumerate(present):
            request = int(self.request[j])
            if self.from_newest[j] == 0 and self.step.sampling.greedy[request]:
                weight = float(log_weights[j, k])
                if weight > 0.0:
                    self.waiting.setdefault(request, []).append((weight, k, head_inputs[i]))
                    self.mass[request] += weight

    def _decide(self, k: int, packed: HeadRows, requests: np.ndarray) -> np.ndarray:
        """Greedy tokens of the mixture that no later head can change any more.

        With `acc(y) = sum_{j<=k} pi_j q_j(y)` and `rest = prod_{j<=k} (1 - p_j)`, later heads add at
        most `rest` to any token, so the argmax is settled once the lead of the top token exceeds
        `rest`. A lead is at most the mass so far, so nothing is evaluated while that is below half.
        """
        sampling = self.step.sampling
        decided = np.zeros(len(requests), dtype=bool)
        for i, request in enumerate(requests):
            if not (sampling.greedy[request] and sampling.may_stop[request]):
                continue
            rest = 1.0 - self.mass[request]
            if self.mass[request] <= rest or self.step.exits[request] != UNDECIDED:
                continue
            for weight, head, head_input in self.waiting.pop(int(request), []):
                logits = self.model.head_logits(head_input[None], head)
                term = weight * torch.softmax(logits[0].float(), dim=-1)
                total = self.summed.get(int(request))
                self.summed[int(request)] = term if total is None else total + term
            top = self.summed[int(request)].topk(2)
            lead = float(top.values[0] - top.values[1])
            if lead > rest + LEAD_TOLERANCE:
                row = int(self.step.batch.query_start[request + 1]) - 1
                packed.fields[row, 1] = top.indices[0].int()
                self.step.exits[request] = k
                decided[i] = True
        return decided

    def at_end(self, rows: Rows, state: torch.Tensor) -> None:
        step, packed = self.step, self._packed(state)
        sampling, final = step.sampling, self.num_exits
        present, in_pass = self._rows_in_pass(rows)
        if len(present):
            index = torch.from_numpy(self.output_rows[present]).to(state.device)
            packed.heads[index, final] = self.model.final_head(_take(state, in_pass))
            chosen = torch.from_numpy(present).to(state.device)
            packed.log_weights[index] = exit_log_weights(self.margins[chosen])
        requests = _requests(rows, step.batch)
        open_ = step.exits[requests] == UNDECIDED
        staying = np.flatnonzero(open_ & ~sampling.mixture[requests])
        if len(staying):
            inputs = self.model.final_head(_take(state, rows.newest()[staying]))
            self._emit(packed, requests[staying], final, inputs)
        step.exits[requests[open_]] = final

    def output(self, state: torch.Tensor) -> torch.Tensor:
        return self._packed(state).packed
